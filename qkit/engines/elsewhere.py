"""The seam, for models that other programs have opened, wrapped or get back: two protocols beside those of `protocol`."""

from typing import TYPE_CHECKING, Any, Protocol

from qkit.engines.protocol import Modules

if TYPE_CHECKING:
    from qkit.reference.merged import Update


class Restores(Modules, Protocol):
    """Prepared layers back to float ones, and models back from the wrappers of other libraries."""

    def restore_layer(self, module: Any) -> Any:
        """The framework's own float layer with the parameters of a prepared layer, but for learned scales."""
        ...

    def unwrap(self, model: Any) -> tuple[Any, dict[str, "Update"]]:
        """`model` without the adapters and copies that other libraries have put around layers; in place, unless it is the root.

        Their own library merges those on float and prepared layers. For converted layers, their updates are returned by path,
        and still to be merged.

        Raises:
            StageError: an adapter on a converted layer is no LoRA or DoRA on a linear layer.
        """
        ...

    def obstacle_to_merge(self, model: Any) -> str:
        """Why an adapter of another library cannot be merged, with the path of its layer; empty where all can."""
        ...


class Remembers(Modules, Protocol):
    """The Hugging Face directory that a model came from."""

    def knows(self, model: Any) -> bool:
        """Whether `model` is of an architecture of the library that builds models for this engine."""
        ...

    def doubts(self, model: Any) -> str:
        """Why files of `model` may hold other names or numbers than transformers has; empty where they do not."""
        ...

    def origin(self, model: Any) -> str | None:
        """The directory that `model` was opened from; None where the model does not say."""
        ...

    def remember_origin(self, model: Any, folder: str) -> None:
        """Notes on `model` the directory that it was opened from."""
        ...
