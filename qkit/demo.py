"""The main job from end to end on real text: train, quantize, train on the grid, deploy, open on another engine, compare."""

import json
import sysconfig
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qkit import artifact, pipeline
from qkit.backend import Backend
from qkit.errors import BackendError
from qkit.interop.compressed_tensors import layout
from qkit.outside import losses_outside
from qkit.qtensor import QTensor
from qkit.recipe import Recipe
from qkit.registry import backend as choose
from qkit.registry import backends
from qkit.registry import recipe as find_recipe
from qkit.training import held_out, read_bytes, train, windows

Tokens = NDArray[np.int32]
Progress = Callable[[str, int, int, float], None]  #: stage, step, steps, loss


@dataclass(frozen=True, slots=True)
class Preset:
    """Size of the model and of its training; `length` in tokens, which are bytes."""

    hidden: int
    layers: int
    intermediate: int
    batch: int
    length: int
    float_steps: int
    float_rate: float
    more_steps: int
    more_rate: float

    @property
    def config(self) -> dict[str, Any]:
        """The Hugging Face configuration of the model."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": 256,
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "intermediate_size": self.intermediate,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "max_position_embeddings": 512,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "initializer_range": 0.08,
            "tie_word_embeddings": False,
            "bos_token_id": None,
            "eos_token_id": None,
            "dtype": "float32",
        }


PRESET = Preset(128, 3, 256, batch=8, length=128, float_steps=700, float_rate=1.5e-3, more_steps=250, more_rate=5e-4)

#: MLX multiplies matrices at some 6 GFLOP/s on a Linux CPU: a smaller model there, which the result says.
PRESETS = {"mlx": replace(PRESET, layers=2, batch=4, length=64, float_steps=230, more_steps=100)}


@dataclass(frozen=True, slots=True)
class Result:
    """What the demo found. Losses are nats per byte of held-out text.

    Training on the grid is more training, which helps by itself. So the float model is trained on too, for as many steps on
    the same text, and what QAT wins back is counted against that.

    Attributes:
        parameters: of the model.
        float_loss, ptq_loss: of the float model, and of the same quantized without training.
        longer_float_loss, longer_ptq_loss: the same after the extra steps in float.
        qat_loss: of the float model after the extra steps on the grid, converted.
        codes_equal, codes_compared: codes, scales and zero points that every engine makes from the trained weights, equal to
            those in the artifact, out of how many comparisons; `engines` names who took part.
        forward_difference: largest difference of a logit before and after `convert`.
        outside: loss of the artifact in other programs, in processes that cannot import qkit; or what stands in the way.
        other_loss: of the artifact on `other`, None where no second engine can build the model; `other_obstacle` says why.
    """

    backend: str
    recipe: str
    parameters: int
    float_loss: float
    ptq_loss: float
    longer_float_loss: float
    longer_ptq_loss: float
    qat_loss: float
    engines: tuple[str, ...]
    codes_equal: int
    codes_compared: int
    forward_difference: float
    other: str | None
    other_loss: float | None
    other_obstacle: str
    outside: dict[str, float | str]
    bits_per_weight: float
    curves: dict[str, list[tuple[int, float]]]
    folder: str

    @property
    def recovered(self) -> float | None:
        """The share of what quantizing cost (PTQ less float, both trained as long) that training on the grid won back.

        None where quantizing cost nothing.
        """
        cost = self.longer_ptq_loss - self.longer_float_loss
        return (self.longer_ptq_loss - self.qat_loss) / cost if cost > 0 else None


def run(*, backend: str | None, recipe: str, folder: Path, progress: Progress, preset: Preset | None = None) -> Result:
    """Trains a small Llama on the standard library's source, and takes it the whole way on `backend`.

    Leaves in `folder`: `float/`, `quantized/` and `mlx/`, Hugging Face directories, and `result.json`. Whatever can go wrong with
    the recipe or the engines does so before the training. `preset` is that of the engine, if left out.

    Raises:
        BackendError: the engine, or what it needs to build a Llama, is missing.
        RecipeError, GridError: the recipe is unknown or does not fit.
        ArtifactError: the artifact has no layout for a grid of the recipe.
    """
    engine = choose(backend)
    if not hasattr(engine, "trainer"):
        raise BackendError(
            f"backend {engine.name!r} cannot train: choose torchao or mlx, which come with pip install 'qkit[all]'"
        )
    grid_recipe, preset = find_recipe(recipe), preset or PRESETS.get(engine.name, PRESET)
    model = engine.build(preset.config)
    _check(engine, model, grid_recipe)
    others = [
        choose(status.name) for status in backends() if status.ready and status.name not in ("numpy", engine.name)
    ]
    other, other_obstacle = _second(engine, preset)
    text, unseen = standard_library(preset)

    curves = {"float": _train(engine, model, text, preset, "float", progress)}
    parameters = sum(int(np.prod(array.shape)) for array in engine.tensors(model).values())
    artifact.save(model, folder / "float", backend=engine)
    (folder / "float" / "config.json").write_text(json.dumps(preset.config, indent=2) + "\n")
    losses = {"float_loss": engine.loss(model, unseen)}
    model = pipeline.convert(artifact.load(folder / "float", backend=engine), grid_recipe)
    losses["ptq_loss"] = engine.loss(model, unseen)

    model = artifact.load(folder / "float", backend=engine)
    curves["float, longer"] = _train(engine, model, text, preset, "float, longer", progress)
    losses["longer_float_loss"] = engine.loss(model, unseen)
    losses["longer_ptq_loss"] = engine.loss(pipeline.convert(model, grid_recipe), unseen)

    model = pipeline.prepare(artifact.load(folder / "float", backend=engine), grid_recipe)
    curves["QAT"] = _train(engine, model, text, preset, "QAT", progress)
    prepared = engine.logits(model, unseen[:8])
    masters = _masters(engine, model)
    model = pipeline.convert(model)
    artifact.save(model, folder / "quantized", source=folder / "float", backend=engine)

    codes = {
        layer.path: engine.unpack(layer.module).map(engine.to_numpy) for layer in engine.layers(model) if layer.rule
    }
    equal, compared = compare([choose("numpy"), engine, *others], masters, codes)
    result = Result(
        backend=engine.name,
        recipe=grid_recipe.name,
        parameters=parameters,
        **losses,
        qat_loss=engine.loss(model, unseen),
        engines=("numpy", engine.name, *(candidate.name for candidate in others)),
        codes_equal=equal,
        codes_compared=compared,
        forward_difference=float(np.abs(engine.logits(model, unseen[:8]) - prepared).max()),
        other=other.name if other else None,
        other_loss=other.loss(artifact.load(folder / "quantized", backend=other), unseen) if other else None,
        other_obstacle=other_obstacle,
        outside=losses_outside(folder / "quantized", folder / "mlx", unseen),
        bits_per_weight=pipeline.coverage(model).bits_per_weight,
        curves=curves,
        folder=str(folder),
    )
    (folder / "result.json").write_text(json.dumps({**asdict(result), "recovered": result.recovered}, indent=2) + "\n")
    return result


def standard_library(preset: Preset) -> tuple[Tokens, Tokens]:
    """Python's own source files: text to train on [n], and windows [rows, length + 1] of every tenth file, held out."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    apart = ("site-packages", "test", "tests", "idlelib")
    files = sorted(file for file in folder.rglob("*.py") if not set(apart) & set(file.relative_to(folder).parts))
    text = read_bytes((file for number, file in enumerate(files) if number % 10), limit=1 << 27)
    unseen = read_bytes(files[::10], limit=1 << 27)
    return text, held_out(unseen, rows=8192 // preset.length, length=preset.length)


def compare(engines: list[Backend], masters: dict[str, Any], codes: dict[str, QTensor[Any]]) -> tuple[int, int]:
    """How many codes, scales and zero points each of `engines` makes from `masters` as they are in `codes`, of how many."""
    equal = compared = 0
    for engine in engines:
        for path, held in codes.items():
            made = engine.quantize(engine.from_numpy(masters[path]), held.grid).map(engine.to_numpy)
            for name, array in held.parts().items():
                equal += int((made.parts()[name] == array).sum())
                compared += array.size
    return equal, compared


def draw(result: Result, file: Path) -> None:
    """Writes the loss curves as a PNG; needs matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    start = 0
    for name, curve in result.curves.items():
        steps, losses = np.array(curve).T
        axes.plot(steps + start, _smooth(losses), label=f"{name}, training text")
        start = start or int(steps[-1])
    for name, loss, color in (
        ("float, longer", result.longer_float_loss, "C1"),
        ("PTQ", result.longer_ptq_loss, "C3"),
        ("QAT", result.qat_loss, "C2"),
    ):
        axes.axhline(loss, color=color, linestyle=":", label=f"{name}, held-out text: {loss:.3f}")
    axes.set_title(f"{result.recipe} on {result.backend}", loc="left")
    top = max(result.ptq_loss, result.qat_loss)
    axes.set(
        xlabel="step", ylabel="loss, nats per byte", ylim=(min(result.float_loss, result.qat_loss) * 0.85, top * 1.25)
    )
    axes.legend(fontsize="small")
    figure.savefig(file, dpi=120)


def _check(engine: Backend, model: Any, recipe: Recipe) -> None:
    """Raises what `prepare` and `save` would raise after the training."""
    pipeline.plan(engine.layers(model), recipe)
    for rule in recipe.rules:
        for grid in (rule.weight, rule.activation):
            if grid:
                layout(grid)


def _second(first: Backend, preset: Preset) -> tuple[Backend | None, str]:
    """The first engine besides `first` and NumPy that can build the model; or None, and what stands in the way."""
    obstacles = []
    for status in backends():
        if status.name in ("numpy", first.name):
            continue
        if not status.ready:
            obstacles.append(f"{status.name} {status.reason}")
            continue
        engine = choose(status.name)
        if not hasattr(engine, "trainer"):
            obstacles.append(f"{status.name} cannot run a language model")
            continue
        try:
            engine.build(preset.config)
        except BackendError as error:
            obstacles.append(f"{status.name}: {error}")
            continue
        return engine, ""
    return None, "; ".join(obstacles) or "there is no second engine: pip install 'qkit[all]'"


def _train(
    engine: Backend, model: Any, text: Tokens, preset: Preset, stage: str, progress: Progress
) -> list[tuple[int, float]]:
    first = stage == "float"
    steps = preset.float_steps if first else preset.more_steps
    curve = []
    for step in train(
        engine,
        model,
        windows(text, batch=preset.batch, length=preset.length, seed=0 if first else 1),
        steps=steps,
        learning_rate=preset.float_rate if first else preset.more_rate,
        warmup=20,
        weight_decay=0.1 if first else 0.0,
    ):
        curve.append((step.number, step.loss))
        progress(stage, step.number, steps, step.loss)
    return curve


def _masters(engine: Backend, model: Any) -> dict[str, NDArray[Any]]:
    prepared = [layer for layer in engine.layers(model) if layer.stage == "prepared"]
    return {layer.path: engine.to_numpy(engine.weight(layer.module)).copy() for layer in prepared}


def _smooth(losses: NDArray[Any]) -> NDArray[Any]:
    """A running mean over up to 20 steps."""
    total = np.cumsum(losses)
    width = min(20, len(losses))
    return np.concatenate([total[:width] / np.arange(1, width + 1), (total[width:] - total[:-width]) / width])
