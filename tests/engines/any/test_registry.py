"""Discovery: names, reasons, duplicates. Real plugins are registered and taken back; nothing is mocked."""

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import qkit
from qkit.engines import registry
from qkit.engines.hookspecs import hookimpl
from qkit.engines.numpy import NumpyBackend
from qkit.engines.protocol import BackendSpec
from qkit.errors import BackendError, RecipeError


@contextmanager
def plugged(**hooks: Any) -> Iterator[None]:
    """A plugin with these hooks, for the length of the block."""
    plugin = ModuleType("plugged")
    for name, hook in hooks.items():
        setattr(plugin, name, hookimpl(hook))
    registry.register(plugin, "plugged")
    try:
        yield
    finally:
        registry.unregister("plugged")


def spec(name: str, framework: str = "numpy") -> BackendSpec:
    return BackendSpec(name, "qkit.engines.numpy:NumpyBackend", framework, "pip install it")


def test_numpy_is_found_and_ready() -> None:
    status = {status.name: status for status in qkit.backends()}
    assert status["numpy"].ready
    assert isinstance(qkit.backend("numpy"), NumpyBackend)


def test_a_backend_is_made_once() -> None:
    assert qkit.backend("numpy") is qkit.backend("numpy")


def test_a_backend_object_is_given_back() -> None:
    engine = NumpyBackend()
    assert qkit.backend(engine) is engine


def test_the_backend_follows_from_the_array() -> None:
    assert registry.backend_of(np.zeros(3)).name == "numpy"


def test_a_thing_of_no_framework_is_refused() -> None:
    with pytest.raises(BackendError, match=r"no backend works on builtins\.list: there is .*numpy for numpy"):
        registry.backend_of([1.0])


def test_an_unknown_backend_names_the_nearest() -> None:
    with pytest.raises(BackendError, match="unknown backend 'nunpy': did you mean 'numpy'"):
        qkit.backend("nunpy")


def test_a_plugin_brings_a_backend_and_takes_it_back() -> None:
    with plugged(qkit_backends=lambda: [spec("other")]):
        assert "other" in [status.name for status in qkit.backends()]
        assert isinstance(qkit.backend("other"), NumpyBackend)
    assert "other" not in [status.name for status in qkit.backends()]


def test_a_missing_framework_gives_the_pip_line() -> None:
    with plugged(qkit_backends=lambda: [spec("absent", "no_such_framework")]):
        status = {status.name: status for status in qkit.backends()}["absent"]
        assert not status.ready
        assert status.reason == "needs no_such_framework: pip install it"
        with pytest.raises(BackendError, match="backend 'absent' needs no_such_framework: pip install it"):
            qkit.backend("absent")


def test_a_backend_of_a_name_that_is_taken_disables_the_newcomer() -> None:
    with plugged(qkit_backends=lambda: [spec("numpy"), spec("another")]):
        status = {status.name: status for status in qkit.backends()}
        assert status["plugged"].reason == (
            "plugin disabled: it brings a backend 'numpy', which is there already: uninstall one"
        )
        assert status["numpy"].ready
        assert "another" not in status


@pytest.mark.parametrize(
    ("name", "reason"),
    [("int4-g64", "which is there already: uninstall one"), ("W4A16", "which is an alias of int4-g128-midmax")],
)
def test_a_recipe_of_a_name_that_is_taken_disables_the_newcomer(tmp_path: Path, name: str, reason: str) -> None:
    file = tmp_path / f"{name}.toml"
    file.touch()
    before = qkit.recipes()
    with plugged(qkit_recipes=lambda: [file]):
        assert qkit.recipes() == before
        assert registry.left_out() == {"plugged": f"it brings a recipe {name!r}, {reason}"}
        assert qkit.recipe("int4-g64").rules


def test_a_recipe_that_cannot_be_read_disables_only_itself(tmp_path: Path) -> None:
    good, bad, absent = (tmp_path / f"{name}.toml" for name in ("good", "bad", "absent"))
    good.write_text(
        'schema = 1\n[grids.w]\nelement = "int4"\ngroup = 8\n[[rules]]\nmatch = "*"\nweight = "w"\n', "utf-8"
    )
    bad.write_text("schema = ", encoding="utf-8")
    with plugged(qkit_recipes=lambda: [good, bad, absent]):
        assert {"good", "int4-g64"} <= set(qkit.recipes())
        assert not {"bad", "absent"} & set(qkit.recipes())
        assert registry.left_out().keys() == {"bad", "absent"}
        for name in ("bad", "absent"):
            with pytest.raises(RecipeError, match=name):
                qkit.recipe(name)


@pytest.mark.parametrize(
    ("hooks", "reason"),
    [
        ({"qkit_backend": lambda: [7]}, "PluginValidationError: unknown hook 'qkit_backend' in plugin"),
        ({"qkit_backends": lambda device: [device]}, "PluginValidationError: .*qkit_backends"),
        ({}, "it has no hook: mark qkit_backends or qkit_recipes"),
        ({"qkit_backends": lambda: None}, "qkit_backends: TypeError"),
        ({"qkit_recipes": lambda: sys.exit(0)}, "SystemExit: 0"),
    ],
)
def test_a_hook_that_is_none_of_ours_is_reported(hooks: dict[str, Any], reason: str) -> None:
    with plugged(**hooks):
        status = {status.name: status for status in qkit.backends()}
        assert re.match(f"plugin disabled: {reason}", status["plugged"].reason), status["plugged"].reason
        assert status["numpy"].ready


@pytest.mark.parametrize("target", ["qkit.engines.numpy:NoSuchClass", "no_such_module:Engine"])
def test_a_backend_that_does_not_load_is_refused_by_name(target: str) -> None:
    with (
        plugged(qkit_backends=lambda: [BackendSpec("absent", target, "numpy", "pip install it")]),
        pytest.raises(BackendError, match=f"backend 'absent' cannot be loaded from {target}"),
    ):
        qkit.backend("absent")


@pytest.mark.parametrize(
    "fields",
    [
        (None, "a:B", "numpy", "install"),
        ("a", "a.B", "numpy", "install"),
        ("a", "a:B", "", "install"),
        ("a", "a:B", "numpy", 7),
    ],
)
def test_a_description_of_a_backend_is_checked_when_it_is_made(fields: tuple[Any, ...]) -> None:
    with pytest.raises(BackendError):
        BackendSpec(*fields)


def test_a_hook_that_fails_disables_only_its_plugin() -> None:
    def broken() -> list[BackendSpec]:
        raise OSError("no disk")

    with plugged(qkit_backends=broken):
        status = {status.name: status for status in qkit.backends()}
        assert status["plugged"].reason == "plugin disabled: qkit_backends: OSError: no disk"
        assert status["numpy"].ready
        with pytest.raises(BackendError, match="backend 'plugged' is disabled: qkit_backends: OSError: no disk"):
            qkit.backend("plugged")
    assert "plugged" not in [status.name for status in qkit.backends()]


def test_a_hook_of_the_wrong_shape_disables_only_its_plugin() -> None:
    with plugged(qkit_backends=lambda: ["not a spec"], qkit_recipes=lambda: [7]):
        status = {status.name: status for status in qkit.backends()}
        assert not status["plugged"].ready
        assert status["numpy"].ready


def test_a_plugin_brings_a_recipe(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(
        'schema = 1\n[grids.w]\nelement = "int4"\ngroup = 8\n[[rules]]\nmatch = "*"\nweight = "w"\n',
        encoding="utf-8",
    )
    with plugged(qkit_recipes=lambda: [file]):
        assert "mine" in qkit.recipes()
        assert qkit.recipe("mine").rules[0].weight == qkit.Grid("int4", 8)
    assert "mine" not in qkit.recipes()


def test_aliases_point_to_recipes_that_exist() -> None:
    assert set(registry.ALIASES.values()) <= set(qkit.recipes())
    assert not set(registry.ALIASES) & set(qkit.recipes())
