"""Every error and warning that qkit raises on purpose. Each message names the way out."""


class QkitError(Exception):
    """Base of every error that qkit raises on purpose."""


class GridError(QkitError, ValueError):
    """A grid that does not exist, or a shape that the grid does not divide."""


class DTypeError(QkitError, TypeError):
    """An array of a type that qkit does not quantize. It quantizes float32, bfloat16 and float16."""


class RangeError(QkitError, ValueError):
    """A NaN, an infinity or a magnitude of 2^127 and more, in an array to quantize."""


class RecipeError(QkitError, ValueError):
    """A recipe that is unknown, malformed, or does not fit the model."""


class BackendError(QkitError, RuntimeError):
    """A backend that is unknown, not installed, broken, or unable to do the work."""


class StageError(QkitError, RuntimeError):
    """A model at the wrong stage: prepared twice, converted before it was prepared, and so on."""


class ArtifactError(QkitError, ValueError):
    """A file or folder that is not the artifact it claims to be, or does not fit the model."""


class LockedError(QkitError, RuntimeError):
    """A folder that another process is writing."""


class PlanError(QkitError, ValueError):
    """A recipe that does not fit a model, a model that lacks a part, or a place that cannot be written: found before any work."""


class RunError(QkitError, ValueError):
    """A training run that is malformed, does not fit its model or data, or is not the run of the checkpoints in its folder."""


class DivergedError(QkitError, ArithmeticError):
    """A training run whose loss or weights are no longer finite."""


class VerificationError(QkitError, ValueError):
    """A directory whose bytes are not those that qkit wrote."""


class CoverageWarning(UserWarning):
    """A recipe that leaves more than half of a model's weights in float."""


class CutWarning(UserWarning):
    """Rows of data that are longer than a sequence, and lose their ends."""


class FamilyWarning(UserWarning):
    """A model of a type whose names and numbers nobody has compared between libraries."""


class FewTokensWarning(UserWarning):
    """A text that is too short for good statistics of a model's layers."""


class ServerWarning(UserWarning):
    """A saved model that a server would not open, or would run with other arithmetic."""


class UnchangedWarning(UserWarning):
    """A training run that changed no code: the quantized model is the one that it began with."""
