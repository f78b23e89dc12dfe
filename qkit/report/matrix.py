"""Models that were trained for one grid each, deployed on every one."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qkit.engines.protocol import Builds
from qkit.evaluation import Evaluation, evaluate


def evaluate_matrix(
    engine: Builds,
    trained: Mapping[str, Callable[[], Any]],
    deploy: Mapping[str, Callable[[Any], Any]],
    rows: NDArray[np.int32],
    *,
    teacher: Any = None,
) -> dict[str, dict[str, Evaluation]]:
    """The evaluation of each trained model on each grid, over `rows` [windows, length + 1]: `found[trained][deployed]`.

    Args:
        trained: by name, a function that opens the float model of the master weights, a new one at every call.
        deploy: by name, a function from a float model to the deployed one, such as `lambda model: qkit.convert(model, recipe)`.
    """
    return {
        name: {grid: evaluate(engine, put(open_model()), rows, teacher=teacher) for grid, put in deploy.items()}
        for name, open_model in trained.items()
    }
