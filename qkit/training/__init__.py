"""Training on any engine: runs, data, schedules, checkpoints and the loop. The engine supplies the step."""

from qkit.training.data import Sequences, read_bytes, sequences
from qkit.training.finish import Outcome
from qkit.training.inputs import teach
from qkit.training.job import train_model
from qkit.training.loop import Order, Step, train
from qkit.training.run import Run, read_run, run_from_table
from qkit.training.schedule import Schedule

__all__ = [
    "Order",
    "Outcome",
    "Run",
    "Schedule",
    "Sequences",
    "Step",
    "read_bytes",
    "read_run",
    "run_from_table",
    "sequences",
    "teach",
    "train",
    "train_model",
]
