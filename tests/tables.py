"""The lists that tests run over: engines by their abilities, elements, types, and the grids that files hold."""

import ml_dtypes
import numpy as np

import qkit
from qkit import element
from qkit.engines.abilities import offers
from qkit.engines.protocol import Builds, Modules, Trains
from qkit.grid import Grid


def _offering(protocol):
    return [name for name in READY if offers(qkit.backend(name), protocol)]


READY = [status.name for status in qkit.backends() if status.ready]
MODULES = _offering(Modules)  #: engines that prepare and convert modules
BUILDERS = _offering(Builds)  #: engines that build a model from its configuration
TRAINERS = _offering(Trains)  #: engines that build a model and train it
INTEGERS = [integer.name for integer in element.INTEGERS]
DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}

#: A grid for each way in which files hold codes and scales.
FILE_GRIDS = [
    *(Grid(name, 64, rule) for name in INTEGERS for rule in ("signed", "minmax")),
    Grid("int4", 32, "absmax"),
    Grid("int4", 128, "midmax"),
    Grid("int8", "row"),
    Grid("int8", "tensor", "minmax"),
    Grid("int4", 256),
    Grid("e2m1", 32),
    Grid("e4m3", 32, "even"),
    Grid("e4m3", "row"),
    Grid("e4m3", "tensor"),
]
