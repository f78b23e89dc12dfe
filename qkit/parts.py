"""The parts of a model by the paths of its layers: the language part, and towers of vision and audio."""

import re
from typing import Literal

Part = Literal["all", "language"]
#: Parts of paths that begin a tower, or the projector between a tower and the language model, in files and in models.
TOWER = re.compile(
    r"(^|\.)(vision|visual|vit|image|audio|video|speech)_(tower|model|encoder|embed\w*|proj\w*|adapter|backbone|transformer)(\.|$)"
    r"|(^|\.)(visual|vision|audio|embed_vision|embed_audio|multi_modal_projector|mm_projector|connector|patch_merger)(\.|$)"
    r"|(^|\.)(visual_projection|vision_language_adapter)(\.|$)"
)


def is_in(path: str, part: Part) -> bool:
    """Whether the layer at `path` is in `part` of its model; all is everything, language is everything but towers."""
    return part == "all" or TOWER.search(path) is None
