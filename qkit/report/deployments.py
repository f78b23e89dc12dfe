"""Models that were trained for one grid each, deployed on every one."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qkit.engines.protocol import Builds
from qkit.evaluation import Evaluation, evaluate


def matrix(
    engine: Builds,
    trained: Mapping[str, Callable[[], Any]],
    deploy: Mapping[str, Callable[[Any], Any]],
    rows: NDArray[np.int32],
    *,
    teacher: Any = None,
) -> dict[str, dict[str, Evaluation]]:
    """What each trained model makes of `rows` [windows, length + 1] on each grid: `found[trained][deployed]`.

    Args:
        trained: by name, what gives the float model of its master weights, anew at every call.
        deploy: by name, what makes the deployed model of a float one, such as `lambda model: qkit.convert(model, recipe)`.
    """
    return {
        name: {grid: evaluate(engine, put(masters()), rows, teacher=teacher) for grid, put in deploy.items()}
        for name, masters in trained.items()
    }
