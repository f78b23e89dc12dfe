"""Makes the directories in `artifacts/`: three tiny artifacts and one export, which later versions write byte for byte.

The stored files were made by qkit 0.1.0 as it was before its modules moved to their present packages, with NumPy 2.4 and torch
2.13 on a CPU: python tests/golden/make_artifacts.py. Inputs are integers, scaled by powers of two, so that no library and no
machine changes them.
"""

import json
import shutil
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

import qkit
from qkit.cli.application import application

OUT = Path(__file__).parent / "artifacts"
HIDDEN, WIDE, VOCABULARY = 64, 128, 48
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "bfloat16",
    "hidden_size": HIDDEN,
    "intermediate_size": WIDE,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-06,
    "rope_parameters": {"rope_type": "default", "rope_theta": 30000.0},
    "tie_word_embeddings": True,
}
LAYER = "model.layers.0"
SHAPES = {
    "model.embed_tokens.weight": (VOCABULARY, HIDDEN),
    "model.norm.weight": (HIDDEN,),
    f"{LAYER}.input_layernorm.weight": (HIDDEN,),
    f"{LAYER}.post_attention_layernorm.weight": (HIDDEN,),
    f"{LAYER}.self_attn.q_proj.weight": (HIDDEN, HIDDEN),
    f"{LAYER}.self_attn.k_proj.weight": (HIDDEN // 2, HIDDEN),
    f"{LAYER}.self_attn.v_proj.weight": (HIDDEN // 2, HIDDEN),
    f"{LAYER}.self_attn.o_proj.weight": (HIDDEN, HIDDEN),
    f"{LAYER}.mlp.gate_proj.weight": (WIDE, HIDDEN),
    f"{LAYER}.mlp.up_proj.weight": (WIDE, HIDDEN),
    f"{LAYER}.mlp.down_proj.weight": (HIDDEN, WIDE),
}

#: int4 with and without zero points, int8 rows, and an embedding that is the head too.
INTEGERS = """
schema  = 1
version = 1
summary = "int4 in groups of 32, two projections with zero points; int8 rows where a layer is wide; the embedding in int8"

[grids.signed]
element = "int4"
group   = 32
scale   = "signed"

[grids.shifted]
element = "int4"
group   = 32
scale   = "minmax"

[grids.rows]
element = "int8"
group   = "row"
scale   = "absmax"

[[rules]]
match  = "model.embed_tokens"
kind   = "embedding"
weight = "rows"

[[rules]]
match  = ["*.down_proj", "lm_head"]
weight = "rows"

[[rules]]
match  = ["*.gate_proj", "*.v_proj"]
weight = "shifted"

[[rules]]
match  = "*"
weight = "signed"
"""

#: Every layout of small floats: NVFP4, MXFP4 with quantized inputs, MXFP8, and e4m3 per row.
SMALL_FLOATS = """
schema  = 1
version = 1
summary = "small floats: NVFP4 attention, MXFP4 inputs and weights, MXFP8 and e4m3 rows in the rest"

[grids.nv]
element = "e2m1"
group   = 16
scale   = "nvfp4"

[grids.mx4]
element = "e2m1"
group   = 32
scale   = "rceil"

[grids.mx8]
element = "e4m3"
group   = 32
scale   = "even"

[grids.rows]
element = "e4m3"
group   = "row"
scale   = "floor"

[[rules]]
match = "lm_head"

[[rules]]
match  = "*.self_attn.*"
weight = "nv"

[[rules]]
match      = "*.gate_proj"
weight     = "mx4"
activation = "mx4"

[[rules]]
match  = "*.up_proj"
weight = "mx8"

[[rules]]
match  = "*.down_proj"
weight = "rows"
"""


def numbers(name, shape):
    """A tensor of bfloat16 values: integers below 128 times a power of two of each row. One tensor for one name."""
    random = np.random.RandomState(sum(name.encode()))  # a stream that NumPy never changes
    whole = random.randint(-127, 128, shape).astype(np.float32)
    power = random.randint(-9, -5, shape[:1] + (1,) * (len(shape) - 1)).astype(np.float32)
    return (whole * np.exp2(power)).astype(ml_dtypes.bfloat16)


def make_source(folder):
    """The float model that the first two artifacts come from: a Llama of one layer."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    save_file({name: numbers(name, shape) for name, shape in SHAPES.items()}, folder / "model.safetensors")


def run(*arguments):
    """A command of `qkit`, in this process."""
    application([str(argument) for argument in arguments], standalone_mode=False)


def make_streamed(out, work):
    """The artifacts of `qkit quantize`, and an export for mlx-lm of the first. No framework is needed."""
    make_source(work / "float")
    for name, recipe in (("integers", INTEGERS), ("small-floats", SMALL_FLOATS)):
        (work / f"{name}.toml").write_text(recipe, encoding="utf-8")
        run("quantize", work / "float", out / name, "--recipe", work / f"{name}.toml")
    run("export", out / "integers", out / "mlx", "--to", "mlx")


def make_module():
    """Two layers of torch side by side, float32."""
    import torch

    layers = {"first": torch.nn.Linear(HIDDEN, 32), "second": torch.nn.Linear(HIDDEN, 16, bias=False)}
    for name, parameter in torch.nn.ModuleDict(layers).named_parameters():
        parameter.data = torch.from_numpy(numbers(name, tuple(parameter.shape)).astype(np.float32))
    return torch.nn.ModuleDict(layers)


def make_saved(out):
    """The artifact of `qkit.save`: int8 weights, and one calibrated scale for the inputs of each layer."""
    import torch

    model = qkit.prepare(make_module(), "int8-static-act-int8-weight")
    with qkit.calibrating(model):
        for name, layer in model.items():
            layer(torch.from_numpy(numbers(f"inputs of {name}", (8, HIDDEN)).astype(np.float32)))
    qkit.save(qkit.convert(model), out / "static")


if __name__ == "__main__":
    work = Path(sys.argv[1])
    shutil.rmtree(OUT, ignore_errors=True)
    make_streamed(OUT, work)
    make_saved(OUT)
