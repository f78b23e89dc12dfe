"""Directories for other programs: mlx-lm's layout, and a float model. Codes are moved or dequantized, never changed."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from qkit.artifact.config import CONFIG, describing
from qkit.artifact.metadata import describe
from qkit.artifact.snapshot import Snapshot
from qkit.errors import ArtifactError
from qkit.exchange.mlx_stacks import check_tensors, stack_streams, stacks_of, tensor_streams
from qkit.exchange.write_model import check_weights_only, rules_of, weight_streams, write_model
from qkit.experts import expert_of
from qkit.formats import dense, mlx_config, mlx_lm
from qkit.formats.mlx_families import Family
from qkit.formats.settings import QUANTIZATION
from qkit.storage.swap import leave_to_system

LATENT = ".kv_b_proj"  #: end of the path of the layer that mlx-lm splits in a family that is `latent`


def export_mlx(source: Snapshot, out: str | Path, *, shard_bytes: int | None = None) -> list[str]:
    """Writes `source` as a directory that mlx-lm opens: the same packed words under other names.

    Returns:
        The paths of layers written as values, not as codes, since mlx-lm would quantize them again.

    Raises:
        ArtifactError: MLX cannot hold a layer's grid; the message names it. Or mlx-lm has no such type of model, or see `Output`.
        BackendError: mlx-lm computes another model from such a configuration; see `mlx_config.model_config`.
    """
    source = source.of_the_model()
    check_weights_only(source, source.weights)
    config, names, family = source.config, source.config or {}, Family()
    changes: dict[str, Any] = {"added": []}
    if config is not None:
        with describing(source.folder / CONFIG):
            family = mlx_config.family_of(config)
            config = mlx_config.model_config(config, tied=source.tied)
        changes = {"added": sorted(config.keys() - names.keys())}
        if replaced := {name: value for name, value in names.items() if config[name] != value}:
            changes["replaced"] = replaced
        check_tensors(source, family)
    values = [path for path in source.weights if family.latent and path.endswith(LATENT)]
    kept = {path: weight for path, weight in source.weights.items() if path not in set(values)}
    containers = {}
    for path, weight in kept.items():
        assert weight.rule.weight is not None
        try:
            containers[mlx_config.place_of(path, names)[0]] = mlx_lm.layout(weight.rule.weight, weight.shape[-1])
        except ArtifactError as error:
            raise ArtifactError(f"{path}: {error}") from None
    if config is not None and containers:  # under both names, as mlx_lm.convert writes it
        config = {**config, **dict.fromkeys(QUANTIZATION, mlx_config.quantization_config(containers))}
    single = {path: weight for path, weight in kept.items() if expert_of(path) is None}
    plain = {mlx_config.to_mlx_name(f"{path}.", names)[:-1]: weight for path, weight in single.items()}
    streams = [
        *stack_streams(stacks_of(kept, names)),
        *tensor_streams(source.tensors, names, family),
        *(stream for path in values for stream in weight_streams(path, source.weights[path], dense)),
    ]
    about = {
        **json.loads(describe(rules_of(replace(source, weights=kept)), fit=source.fit)),
        "layout": "mlx",
        **changes,
    }
    rest = replace(source, weights=plain, tensors={})
    write_model(
        rest, out, mlx_lm, about=about, config=config, shard_bytes=shard_bytes, more=streams, bring=leave_to_system
    )
    return values


def export_dense(source: Snapshot, out: str | Path, *, shard_bytes: int | None = None) -> None:
    """Writes `source` as a float model: the dequantized weights, in the type that they had before.

    Raises:
        ArtifactError: see `Output`.
    """
    check_weights_only(source, source.weights)
    write_model(source, out, dense, about=None, config=source.config, shard_bytes=shard_bytes, bring=leave_to_system)
