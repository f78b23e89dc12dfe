"""Directories for other programs: mlx-lm's layout, and a float model. Codes are moved or dequantized, never changed."""

import json
from dataclasses import replace
from pathlib import Path

from qkit.artifact.config import CONFIG, describing
from qkit.artifact.metadata import describe
from qkit.artifact.snapshot import Snapshot
from qkit.errors import ArtifactError
from qkit.exchange.write_model import check_weights_only, rules_of, write_model
from qkit.formats import dense, mlx_config, mlx_lm
from qkit.formats.settings import QUANTIZATION
from qkit.storage.layout import SHARD_BYTES


def export_mlx(source: Snapshot, out: str | Path, *, shard_bytes: int = SHARD_BYTES) -> None:
    """Writes `source` as a directory that mlx-lm opens: the same packed words under other names.

    Raises:
        ArtifactError: MLX cannot hold a layer's grid; the message names it. Or see `Output`.
        BackendError: mlx-lm computes another model from such a configuration; see `mlx_config.model_config`.
    """
    check_weights_only(source, source.weights)
    containers = {}
    for path, weight in source.weights.items():
        assert weight.rule.weight is not None
        try:
            containers[path] = mlx_lm.layout(weight.rule.weight, weight.shape[-1])
        except ArtifactError as error:
            raise ArtifactError(f"{path}: {error}") from None
    config, added = source.config, []
    if config is not None:
        with describing(source.folder / CONFIG):
            config = mlx_config.model_config(config, tied=source.tied)
        added = sorted(config.keys() - (source.config or {}).keys())
        if containers:  # under both names, as mlx_lm.convert writes it
            config = {**config, **dict.fromkeys(QUANTIZATION, mlx_config.quantization_config(containers))}
    for name, array in source.tensors.items():
        if array.ndim > 2 and ".experts." in name:
            raise ArtifactError(
                f"{name}: mlx-lm reads experts one by one, not stacked: export an artifact of `qkit quantize`"
            )
    about = {**json.loads(describe(rules_of(source))), "layout": "mlx", "added": added}
    write_model(_under_mlx_names(source), out, mlx_lm, about=about, config=config, shard_bytes=shard_bytes)


def export_dense(source: Snapshot, out: str | Path, *, shard_bytes: int = SHARD_BYTES) -> None:
    """Writes `source` as a float model: the dequantized weights, in the type that they had before.

    Raises:
        ArtifactError: see `Output`.
    """
    check_weights_only(source, source.weights)
    write_model(source, out, dense, about=None, config=source.config, shard_bytes=shard_bytes)


def _under_mlx_names(source: Snapshot) -> Snapshot:
    """`source` under mlx-lm's tensor names."""
    config = source.config or {}
    weights = {mlx_config.to_mlx_name(f"{path}.", config)[:-1]: weight for path, weight in source.weights.items()}
    return replace(
        source, weights=weights, tensors={mlx_config.to_mlx_name(n, config): a for n, a in source.tensors.items()}
    )
