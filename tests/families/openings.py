"""A directory opened as its users open it: in transformers, in qkit on each engine, in mlx-lm; the results are plain arrays."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from qkit_torchao.models.surgery import CONVERTED

import qkit
from qkit.experts import expert_of

TOKENS = np.array([[1, 5, 12, 9, 3, 44, 2, 7]], np.int32)
LENGTH = 64  #: of a sound, in frames of the encoder's own positions


def run(model: Any) -> np.ndarray:
    """Logits of a transformers model, or its last hidden states, in float32."""
    tokens, config = torch.from_numpy(TOKENS).long(), model.config
    given: dict[str, Any] = {}
    drawing = torch.Generator().manual_seed(1)
    if model.main_input_name == "input_features":
        given["input_features"] = torch.randn(1, config.num_mel_bins, 2 * LENGTH, generator=drawing)
    elif model.main_input_name != "pixel_values" and (
        hasattr(config, "text_config") or not hasattr(config, "patch_size")
    ):
        given["input_ids"] = tokens
    if getattr(config, "is_encoder_decoder", False):
        given["decoder_input_ids"] = tokens[:, :4]
    if config.model_type in ("clip", "siglip") or model.main_input_name == "pixel_values":
        given["pixel_values"] = torch.randn(1, 3, 32, 32, generator=drawing)
    with torch.no_grad():
        out = model(**given)
    for key in ("logits", "logits_per_text", "last_hidden_state"):
        if getattr(out, key, None) is not None:
            return out[key].float().numpy()
    raise AssertionError(f"{type(model).__name__} gives {list(out)}")


def weights(model: Any) -> dict[str, np.ndarray]:
    """Every parameter and buffer of a torch model by name, in float32; codes as the values that they stand for."""
    found = dict(model.state_dict(keep_vars=True).items())
    _experts(model, found)
    for path, module in model.named_modules():
        decoded = _values(module)
        if decoded is not None:
            found[f"{path}.weight"] = decoded
    return {name: tensor.detach().float().numpy() for name, tensor in found.items() if tensor.is_floating_point()}


def _values(module: Any) -> torch.Tensor | None:
    if hasattr(module, "quantization_scheme") and hasattr(module, "weight_scale"):
        from compressed_tensors.compressors.base import decompress_module

        if not hasattr(module, "weight"):
            decompress_module(module)
        return module.weight
    if isinstance(module, CONVERTED):
        return qkit.dequantize(qkit.backend("torchao").unpack(module))
    return None


def _experts(model: Any, found: dict[str, Any]) -> None:
    """Puts the weights of all experts of a block, by projection, in place of the tensors that stack them, or of single ones."""
    engine = qkit.backend("torchao")
    for layer in engine.layers(model):
        if layer.kind != "experts":
            continue
        for name in layer.stored:
            found.pop(name, None)
        if layer.stage == "converted":
            each = engine.unpack_experts(layer.module)
            values = {key: torch.stack([engine.dequantize(one) for one in mine]) for key, mine in each.items()}
        else:
            values = engine.experts(layer.module)
        found.update((f"{layer.path}: {key}", value) for key, value in values.items())
    single: dict[str, dict[int, Any]] = {}
    for name in list(found):
        if (place := expert_of(name.removesuffix(".weight"))) and name.endswith(".weight"):
            single.setdefault(f"{place[0]}: {place[2]}", {})[place[1]] = found.pop(name)
    found.update((name, torch.stack([mine[number] for number in sorted(mine)])) for name, mine in single.items())


def in_transformers(folder: Path, **arguments: Any) -> Any:
    """The model in `folder` by the class that its configuration names."""
    config = json.loads((folder / "config.json").read_text())
    cls = getattr(transformers, config["architectures"][0])
    return cls.from_pretrained(folder, dtype="auto", **arguments).eval()


def by_default(folder: Path) -> Any:
    """The same, with no argument that has to do with quantization."""
    return in_transformers(folder)


def dequantized(folder: Path) -> Any:
    """The same, asked to decode the weights when it loads them."""
    from transformers import CompressedTensorsConfig

    return in_transformers(folder, quantization_config=CompressedTensorsConfig(dequantize=True))


def in_qkit(folder: Path) -> Any:
    """The model in `folder` on qkit's torch engine."""
    return qkit.load(folder, backend="torchao")


def on_mlx(folder: Path) -> np.ndarray:
    """Logits of the model in `folder` on qkit's MLX engine."""
    return qkit.backend("mlx").logits(qkit.load(folder, backend="mlx"), TOKENS)


def in_mlx_lm(folder: Path) -> np.ndarray:
    """Logits of the model in `folder`, exported, in mlx-lm."""
    from qkit.artifact.snapshot import read_own
    from qkit.exchange.export_model import export_mlx

    export_mlx(read_own(folder), folder.parent / "mlx")
    return float_in_mlx_lm(folder.parent / "mlx")


def float_in_mlx_lm(folder: Path) -> np.ndarray:
    """Logits of the model in `folder` in mlx-lm, as the directory is."""
    import mlx.core as mx
    from mlx_lm.utils import load_model

    model, _ = load_model(folder)
    return np.array(model(mx.array(TOKENS)).astype(mx.float32))


def in_mlx_lm_at_all(config: dict[str, Any]) -> bool:
    """Whether mlx-lm has a model of this type."""
    from mlx_lm.utils import _get_classes

    try:
        _get_classes(config)
    except (ValueError, SystemExit):  # its OLMo leaves Python where a package is missing
        return False
    return True
