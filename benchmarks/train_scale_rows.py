"""The rows of `train_scale.py`: steps, each beside the standard step that it is divided by. Nothing runs here."""

from dataclasses import dataclass, replace

INT8 = "int8-dynamic-act-int4-weight"
FLOAT8 = "float8-dynamic-act-float8-weight"
REAL = {"hidden": 2048, "inner": 8192, "layers": 16, "heads": 16, "vocabulary": 32000, "batch": 8, "length": 1024}
WIDE = {"hidden": 4096, "inner": 14336, "layers": 4, "heads": 32, "vocabulary": 32000, "batch": 8, "length": 1024}
TINY = {"hidden": 64, "inner": 128, "layers": 2, "heads": 4, "vocabulary": 256, "batch": 2, "length": 32}


@dataclass(frozen=True)
class Variant:
    """One kind of step.

    Attributes:
        recipe: qkit's, or empty.
        peer: torchao's way, or empty.
        optimizer: `torch` or `qkit`.
        compiled: nothing, `layers` or `model`.
        lora: nothing; `plain`, factors in bfloat16 beside a layer; `peft`, its defaults, whose factors are float32; `prepared` or
            `converted`: qkit's adapters on such a base, whose factors are float32.
        micro: micro-batches of a step.
        graph: whether a CUDA graph replays the step.
        chunks: whether logits are computed in chunks, as `qkit train` does.
    """

    recipe: str = ""
    peer: str = ""
    optimizer: str = "torch"
    compiled: str = ""
    checkpoints: bool = False
    lora: str = ""
    micro: int = 1
    wide: bool = False
    graph: bool = False
    chunks: bool = False


@dataclass(frozen=True)
class Row:
    """A line of the table: a variant, over the standard step."""

    name: str
    standard: Variant
    variant: Variant


def rows(ranks: int) -> list[Row]:
    """The table, for so many processes."""
    plain = Variant()
    if ranks > 1:
        micro, wide = replace(plain, micro=4), Variant(wide=True)
        many = replace(wide, micro=4)
        return [
            Row("FSDP2, int4-g32, torch's AdamW", plain, Variant("int4-g32")),
            Row("FSDP2, int4-g32, qkit.adamw", plain, Variant("int4-g32", optimizer="qkit")),
            Row("FSDP2, int4-g32, 4 micro-batches", micro, replace(micro, recipe="int4-g32")),
            Row("FSDP2, int4-g32, torch's AdamW, 8 B shape", wide, replace(wide, recipe="int4-g32")),
            Row("FSDP2, int4-g32, 4 micro-batches, 8 B shape", many, replace(many, recipe="int4-g32")),
            Row("FSDP2, int8 activations and int4", plain, Variant(INT8)),
            Row("FSDP2, layers compiled, int4-g32", Variant(compiled="layers"), Variant("int4-g32", compiled="layers")),
            Row("FSDP2, torchao QAT int4", plain, Variant(peer="int4")),
            Row("FSDP2, float8 both sides", plain, Variant(FLOAT8)),
        ]
    saving = Variant(checkpoints=True)
    whole = Variant(compiled="model")
    lora, codes, peft = Variant(lora="plain"), Variant("int4-g32", lora="converted"), Variant(lora="peft")
    saving_lora = replace(lora, checkpoints=True)
    chunked_lora = replace(saving_lora, chunks=True)
    wide = Variant(wide=True)
    return [
        Row("int4-g32, torch's AdamW", plain, Variant("int4-g32")),
        Row("int4-g32, qkit.adamw", plain, Variant("int4-g32", optimizer="qkit")),
        Row("float8 both sides, eager", plain, Variant(FLOAT8)),
        Row("float8 both sides, eager, qkit.adamw", plain, Variant(FLOAT8, optimizer="qkit")),
        Row("float8 both sides, eager, 8 B shape", wide, replace(wide, recipe=FLOAT8)),
        Row(
            "float8 both sides, in a graph, 8 B shape",
            replace(wide, graph=True),
            replace(wide, recipe=FLOAT8, graph=True),
        ),
        Row("int8 activations and int4", plain, Variant(INT8)),
        Row("int8 activations and int4, checkpointing", saving, replace(saving, recipe=INT8)),
        Row("adapters on a prepared base, over peft", peft, Variant("int4-g32", lora="prepared")),
        Row("adapters on a converted base, over peft", peft, codes),
        Row("adapters on a prepared base, over LoRA", lora, Variant("int4-g32", lora="prepared")),
        Row("adapters on a converted base, over LoRA in bf16", lora, codes),
        Row("adapters on a converted base, logits in chunks, over LoRA in bf16", lora, replace(codes, chunks=True)),
        Row("the same, checkpointing", saving_lora, replace(codes, checkpoints=True, chunks=True)),
        Row("the same, over LoRA with logits in chunks", chunked_lora, replace(codes, checkpoints=True, chunks=True)),
        Row("whole model compiled, int4-g32", whole, replace(whole, recipe="int4-g32")),
        Row("whole model compiled, int8 activations", whole, replace(whole, recipe=INT8)),
        Row("whole model compiled, float8 both sides", whole, replace(whole, recipe=FLOAT8)),
        Row("torchao QAT int4", plain, Variant(peer="int4")),
        Row("torchao float8 training, eager", plain, Variant(peer="float8")),
        Row("torchao QAT int8 activations, checkpointing", saving, replace(saving, peer="int8-int4")),
        Row("whole model compiled, torchao float8 training", whole, replace(whole, peer="float8")),
    ]
