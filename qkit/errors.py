"""Everything qkit raises on purpose: one base, a handful of children, each message naming the way out."""


class QkitError(Exception):
    """Base of every error that qkit raises on purpose."""


class GridError(QkitError, ValueError):
    """A grid that does not exist, or a shape that the grid does not divide."""


class DTypeError(QkitError, TypeError):
    """An array of a type that is not quantized: only float32, bfloat16 and float16 are."""


class RangeError(QkitError, ValueError):
    """A NaN, an infinity or a magnitude of 2^127 and more, where codes were asked for."""


class RecipeError(QkitError, ValueError):
    """A recipe that is unknown, malformed, or does not fit the model."""


class BackendError(QkitError, RuntimeError):
    """A backend that is unknown, not installed, broken, or unable to do what was asked."""


class StageError(QkitError, RuntimeError):
    """A model at the wrong stage: prepared twice, converted before it was prepared, and so on."""


class ArtifactError(QkitError, ValueError):
    """A file or folder that is not the artifact it claims to be, or does not fit the model."""


class LockedError(QkitError, RuntimeError):
    """A folder that another process is writing."""


class PlanError(QkitError, ValueError):
    """A recipe and a checkpoint that do not go together, or a checkpoint that lacks a part: found before any work."""


class RunError(QkitError, ValueError):
    """A training run that is malformed, does not fit its model or data, or is not the one that it would go on from."""


class DivergedError(QkitError, ArithmeticError):
    """A training run whose loss or weights are no longer finite."""


class VerificationError(QkitError, ValueError):
    """A directory that is not, or is no longer, what was written."""
