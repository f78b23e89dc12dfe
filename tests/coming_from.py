"""The lines of other tools beside qkit's, which test_seeds.py runs. `python tests/coming_from.py` writes the page of them."""

from dataclasses import dataclass
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs/how-to/coming-from.md"


@dataclass(frozen=True)
class Seed:
    """One statement of another tool on training, and the same with qkit.

    Attributes:
        name: the tool and what it says.
        theirs, ours: lines of code; `model`, `train` and so on are the user's own.
        note: what differs.
        ran: whether the other tool's own lines run, and where.
    """

    name: str
    theirs: str
    ours: str
    note: str = ""
    ran: str = ""

    def __str__(self):
        return self.name


def lines(code):
    """How many lines of code a user writes: neither blank lines, nor imports, nor comments."""
    return sum(bool(line.strip()) and not line.startswith(("#", "import ", "from ")) for line in code.splitlines())


def _torchao(config, options, recipe):
    return Seed(
        f"torchao: QATConfig over {config}",
        f"""from torchao.quantization import {config}, quantize_
from torchao.quantization.qat import QATConfig

base_config = {config}({options})
quantize_(model, QATConfig(base_config, step="prepare"))
train(model)
quantize_(model, QATConfig(base_config, step="convert"))""",
        f"""import qkit

model = qkit.prepare(model, "{recipe}")
train(model)
model = qkit.convert(model)""",
        "torchao also quantizes the output head; the recipe leaves it in float.",
        "Its `prepare` runs in the test; its `convert` needs kernels of a GPU.",
    )


TORCHAO = [
    _torchao("Int8DynamicActivationIntxWeightConfig", "", "int8-dynamic-act-int4-weight"),
    _torchao("Int4WeightOnlyConfig", "group_size=128", "int4-weight-only"),
    _torchao("Float8DynamicActivationFloat8WeightConfig", "", "float8-dynamic-act-float8-weight"),
]

TORCHAO_LORA = Seed(
    "torchao: QATConfig with LoRA",
    """from peft import LoraConfig, get_peft_model
from torchao.quantization import Int4WeightOnlyConfig, quantize_
from torchao.quantization.qat import QATConfig

base_config = Int4WeightOnlyConfig(group_size=128)
quantize_(model, QATConfig(base_config, step="prepare"))
model = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
train(model)
model = model.merge_and_unload()
quantize_(model, QATConfig(base_config, step="convert"))""",
    """import qkit

model = qkit.adapt(qkit.prepare(model, "int4-weight-only"), qkit.Adapter(match=("*q_proj",)))
train(model)
model = qkit.convert(qkit.merge(model))""",
    "Here the adapter is inside of the grid, and its merge changes no logit. peft's own adapters work on a prepared model, too: "
    "see [LoRA](lora.md).",
    "Its lines up to the training run in the test; its `convert` needs kernels of a GPU.",
)

TORCHAO_SCHEDULE = Seed(
    "torchao: fake quantization off for the first steps",
    """from torchao.quantization import Int4WeightOnlyConfig, quantize_
from torchao.quantization.qat import QATConfig, linear

quantize_(model, QATConfig(Int4WeightOnlyConfig(group_size=128), step="prepare"))
model.apply(linear.disable_linear_fake_quant)
train(model)
model.apply(linear.enable_linear_fake_quant)
train(model)""",
    """import qkit

model = qkit.prepare(model, "int4-weight-only")
qkit.disable(model)
train(model)
qkit.enable(model)
train(model)""",
    'In transformers\' Trainer: `QatCallback("int4-weight-only", start=100)`.',
    "Both run in the test.",
)

TORCHAO_AFTER = Seed(
    "torchao: quantize_ without training",
    """from torchao.quantization import Int8WeightOnlyConfig, quantize_

quantize_(model, Int8WeightOnlyConfig())""",
    """import qkit

model = qkit.convert(model, "int8-row")""",
    "torchao also quantizes the output head; the recipe leaves it in float.",
    "Both run in the test.",
)


def _inc(theirs, ours):
    return Seed(
        f"Intel Neural Compressor: prepare_qat with {theirs}",
        f"""from neural_compressor.torch.quantization.quantize import prepare_qat

prepare_qat(model, {{torch.nn.Linear: "{theirs}"}})
train(model)""",
        f"""import qkit

model = qkit.prepare(model, "{ours}")
train(model)""",
        "Both leave the output head in float. `qkit.convert(model)` and `qkit.save(model, ...)` follow. Without auto-round, INC "
        "puts in no quantizer, and says so in its log alone.",
        "Its lines run in the test, where neural-compressor is installed (3.10 with auto-round, CPU).",
    )


INC = [_inc("MXFP4", "mxfp4"), _inc("MXFP8", "mxfp8")]


def _forgather(recipe):
    return Seed(
        f"Forgather: qat_recipe = {recipe}",
        f"""from forgather.ml.trainer import Trainer, TrainingArguments

args = TrainingArguments(output_dir="run", qat_recipe="{recipe}", **options)
trainer = Trainer(args=args, model_init=model_factory, train_dataset=data)
trainer.train()

# forgather finalize run out --quantize {recipe}""",
        f"""from qkit_torchao import QatCallback
from transformers import Trainer, TrainingArguments
args = TrainingArguments(output_dir="run", **options)
trainer = Trainer(args=args, model_init=model_factory, train_dataset=data, callbacks=[QatCallback("{recipe}")])
trainer.train()""",
        "Forgather's recipe strings are names of qkit's recipes. To finalize: "
        '`qkit.convert(trainer.model).save_pretrained("out")`, safetensors that transformers opens.',
        "Its own lines were not run: it is not on PyPI. torchao's configuration, which its source names for the string, runs in "
        "the test: qkit's rounding error is within 10 % of that of torchao's quantizer, and the codes differ, since scales do.",
    )


FORGATHER = [
    _forgather(recipe)
    for recipe in ("int8-dynamic-act-int4-weight", "int4-weight-only", "float8-dynamic-act-float8-weight")
]

HOOK = Seed(
    "mlx-lm-lora: the hook of qat_enable, qat_bits and qat_group_size",
    """from mlx_lm_lora.trainer.sft_trainer import SFTTrainingArgs, train_sft

args = SFTTrainingArgs(iters=4, batch_size=2, qat_enable=True, qat_bits={bits}, qat_group_size={group})
train_sft(model, optimizer, data, args=args)""",
    """import qkit
from mlx_lm.tuner.trainer import TrainingArgs, train
model = qkit.prepare(model, "int{bits}-g{group}")
train(model, optimizer, data, args=TrainingArgs(iters=4, batch_size=2))""",
    "No layer of MLX has the grid of the hook; its scale rule is `absmax`, as in `int4-g64-absmax`. `qkit.convert(model)` ships "
    "the grid that was trained. train_sft trains a prepared model, too.",
    "Its trainer runs in the test.",
)

LOAD = Seed(
    "mlx-lm-lora: load_in_4bits, load_in_6bits, load_in_8bits, load_in_mxfp4",
    """from mlx_lm_lora.utils import from_pretrained

lora = {{"rank": 4, "scale": 2.0, "dropout": 0.0}}
model, tokenizer, _ = from_pretrained(path, lora_config=lora, quantized_load={table})
train(model)""",
    """import qkit
from mlx_lm.tuner.utils import linear_to_lora_layers
model = qkit.convert(qkit.load(path, backend="mlx"), "{recipe}")
linear_to_lora_layers(model, 2, {{"rank": 4, "scale": 2.0, "dropout": 0.0}})
train(model)""",
    "The adapters are inside of the grid, so that `qkit.merge(model)` merges them into codes without loss.",
    "Its lines were not run.",
)

SCHEDULE = Seed(
    "mlx-lm-lora: qat_start_step and qat_interval",
    "mlx_lm_lora.train --train --model model --data text --qat-enable --qat-bits 4 --qat-start-step 3 --qat-interval 2",
    "qkit train model out -r int4-g32 --data text.txt --set quantization.start=3 --set quantization.interval=2 --backend mlx",
    "In transformers' Trainer: `QatCallback(recipe, start=2, interval=2)`. Its own line works after `qkit mlx-lora`, too: see "
    "the next section.",
    "Its parser and its trainer run in the test.",
)

FINALIZE = Seed(
    "Forgather: finalize --quantize, after training or without it",
    "forgather finalize run out --quantize int4-weight-only",
    "qkit quantize run out -r int4-weight-only",
    "`run` is a checkpoint of a prepared model, which has the names of the float model, or a float model. The codes are those of "
    "`qkit.convert(trainer.model)`. Forgather writes `.bin`, and qkit safetensors.",
    "Its own line was not run: it is not on PyPI.",
)

COMPARE = Seed(
    "Forgather: float, quantized afterwards, and trained on the grid, evaluated",
    """forgather finalize float ptq --quantize int4-weight-only
forgather finalize run qat --quantize int4-weight-only
forgather eval float
forgather eval ptq
forgather eval qat""",
    "qkit compare float --qat qat --data text.txt --out report",
    "One command measures all three on the same windows, and writes a page.",
    "Its own lines were not run: it is not on PyPI, and its page says that its `eval` does not open such files yet.",
)

METHODS = [
    Seed(
        f"mlx-lm-lora: --train-mode {mode}",
        f"mlx_lm_lora.train --train --train-mode {mode} --model model --data data --adapter-path out --load-in-4bits",
        f"qkit mlx-lora mlx_lm_lora.train --train --train-mode {mode} --model model --data data --adapter-path out "
        "--load-in-4bits",
        "Or `qkit train model out -r int4-g32 --method " + mode + " --data rows.jsonl`, on MLX and on torch.",
        "mlx-lm-lora's parser and trainer run in the test.",
    )
    for mode in ("sft", "dpo", "orpo")
]

STUDIO = Seed(
    "MLX-LoRA-Studio and mlx-lm-lora: a command line as it is",
    "mlx_lm_lora.train --train --model model --data data --adapter-path out --train-type full --qat-enable --qat-bits 4",
    "qkit mlx-lora mlx_lm_lora.train --train --model model --data data --adapter-path out --train-type full --qat-enable "
    "--qat-bits 4",
    "The studio writes such lines. `--qat-bits` and `--qat-group-size` name the grid, as in `int4-g64-absmax`; `--load-in-4bits` "
    "and its kin train adapters on packed codes. `out` is then the artifact.",
    "Its parser and its trainer run in the test.",
)

MLX_LM = Seed(
    "mlx-lm: lora",
    "mlx_lm.lora --model model --train --data data --fine-tune-type full",
    "qkit mlx-lora model out -r int4-g64 --data data --fine-tune-type full",
    "mlx-lm trains in float, and `mlx_lm.convert -q` quantizes afterwards. All options after `-r` are mlx-lm's own.",
    "mlx-lm itself carries out the line in the test.",
)

TRL = Seed(
    "TRL: SFTTrainer",
    """from trl import SFTConfig, SFTTrainer

trainer = SFTTrainer(model=model, args=SFTConfig(**options), train_dataset=data, processing_class=tokenizer)
trainer.train()""",
    """from qkit_torchao import QatCallback
from trl import SFTConfig, SFTTrainer

callbacks = [QatCallback("int4-g64")]
trainer = SFTTrainer(
    model=model, args=SFTConfig(**options), train_dataset=data, processing_class=tokenizer, callbacks=callbacks
)
trainer.train()""",
    "TRL trains in float. The same callback serves its DPO, GRPO and reward trainers. Afterwards "
    '`qkit.convert(trainer.model).save_pretrained("out")`. On the command line: `qkit train model out --method sft`.',
    "Both run in the test.",
)

UNSLOTH = Seed(
    "unsloth: qat_scheme",
    """from unsloth import FastLanguageModel

model, tokenizer = FastLanguageModel.from_pretrained(path, full_finetuning=True, qat_scheme="int4")
train(model)""",
    """from unsloth import FastLanguageModel
from qkit_torchao import qat_scheme

model, tokenizer = FastLanguageModel.from_pretrained(path, full_finetuning=True)
model = qat_scheme(model, "int4")
train(model)""",
    "`qat_scheme` takes unsloth's names, or a recipe of qkit's.",
    "unsloth ran the second block with its own loader on a CPU (2026.10.9); there, its own `qat_scheme` is not offered.",
)

AXOLOTL = Seed(
    "axolotl: qat",
    """base_model: model
qat:
  weight_dtype: int4
  group_size: 32""",
    """base_model: model
plugins: [qkit.integrations.axolotl.QkitPlugin]
qkit:
  recipe: int4-g32""",
    "The plugin trains on the grid and writes the artifact into `OUTPUT_DIR/qkit`. `qat` and `qkit` together are refused.",
    "axolotl 0.19.0 itself loads the plugin and trains the second block in `tests/training/test_axolotl.py`, where it is "
    "installed. That ran on a CPU, with newer libraries than axolotl pins: transformers 5.23.0, peft 0.21.2, accelerate 1.15.0, "
    "datasets 5.2.0 and torchao 0.18.0.",
)

BITS = [(bits, group) for bits in (2, 3, 4, 5, 6, 8) for group in (32, 64)]
LOADS = {
    "int4-g64": '{"bits": 4, "group_size": 64}',
    "int6-g64": '{"bits": 6, "group_size": 64}',
    "int8-g64": '{"bits": 8, "group_size": 64}',
    "mxfp4-a16": '{"bits": 4, "group_size": 32, "mode": "mxfp4"}',
}


def page():
    """The text of docs/how-to/coming-from.md."""
    shown = [
        [*TORCHAO, TORCHAO_LORA, TORCHAO_SCHEDULE, TORCHAO_AFTER],
        *(INC, [*FORGATHER, FINALIZE, COMPARE]),
        [
            _filled(HOOK, bits=4, group=64),
            _filled(LOAD, recipe="int4-g64", table=LOADS["int4-g64"]),
            SCHEDULE,
            STUDIO,
            *METHODS,
        ],
        [MLX_LM, TRL, UNSLOTH, AXOLOTL],
    ]
    parts = [
        "# Coming from other tools\n\n"
        "The first block of each section is the other tool's own, and the second is qkit's. Tests run qkit's blocks: the\n"
        "loss differs from that of float training, and the codes are those of the last step's weights. This page is written\n"
        "from the tests (`python tests/coming_from.py`), so that it shows the blocks that run.\n"
    ]
    for seed in (one for group in shown for one in group):
        blocks = [f"```text\n{code}\n```" for code in (seed.theirs, seed.ours)]
        parts.append(f"## {seed.name}\n\n{blocks[0]}\n\nWith qkit:\n\n{blocks[1]}\n\n{seed.note} {seed.ran}\n")
    return "\n".join(parts)


def _filled(seed, **values):
    return Seed(seed.name, seed.theirs.format(**values), seed.ours.format(**values), seed.note, seed.ran)


def filled(seed, **values):
    """`seed` with `values` in its lines."""
    return _filled(seed, **values)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
