"""The examples in the docstrings are true."""

import doctest
from importlib import import_module
from importlib.util import find_spec
from pkgutil import walk_packages

import pytest

import qkit

OTHERS = {"qkit.integrations.axolotl": "axolotl"}  #: modules of other programs' plugins, which import those programs
MODULES = ["qkit", *(module.name for module in walk_packages(qkit.__path__, "qkit."))]
MODULES = [name for name in MODULES if name not in OTHERS or find_spec(OTHERS[name])]


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of_a_module_are_true(name: str) -> None:
    assert doctest.testmod(import_module(name)).failed == 0


def test_there_are_examples() -> None:
    assert sum(doctest.testmod(import_module(name)).attempted for name in MODULES) >= 4
