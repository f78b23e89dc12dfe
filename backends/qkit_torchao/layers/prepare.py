"""Preparing a layer: the training form of a Linear or an Embedding."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qkit.reference.ranges import static_names
from qkit.rules import Rule
from qkit_torchao.arithmetic import ranges
from qkit_torchao.cache import values
from qkit_torchao.layers import sharded, straight_through
from qkit_torchao.layers.become import become
from qkit_torchao.layers.gates import gate
from qkit_torchao.layers.prepared import FakeLinear, Prepared
from qkit_torchao.layers.scaled_embedding import scaled
from qkit_torchao.layers.settling import put_on, reserve_codes, settle


class FakeEmbedding(Prepared, nn.Embedding):
    """An embedding that looks up its weight's quantized values; see `FakeLinear`."""

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens [...] -> [..., width]."""
        options = (self.padding_idx, None, 2.0, self.scale_grad_by_freq, self.sparse)
        frozen = self.training and self.frozen
        whole = not (sharded.is_managed(self) or sharded.is_shard(self.weight))
        if torch.compiler.is_compiling() and self.caches and whole and self.weight_grid.by_rows and not frozen:
            rows = F.embedding(tokens, self.weight, *options)
            on_grid = straight_through.fake_quantize(rows, self.weight_grid, ste=self.rule.ste)
            return scaled(self, torch.where(self.gate, on_grid, rows))
        return scaled(self, F.embedding(tokens, self.weight_values(self.weight.dtype), *options))


def prepare_layer(module: nn.Module, rule: Rule, cls: type[nn.Module] | None = None) -> Any:
    """The training form of a float Linear or Embedding: same parameters, hooks and mode, other class."""
    assert rule.weight is not None
    layer = become(module, cls or (FakeEmbedding if isinstance(module, nn.Embedding) else FakeLinear))
    put_on(layer, rule)
    device = layer.weight.device
    layer.register_buffer("gate", gate(device, on=True), persistent=False)
    for name in static_names(rule):
        layer.register_buffer(f"{name}_range", torch.tensor(ranges.EMPTY, device=device))
    layer.mode, layer.calibrating, layer.frozen = "on", False, False
    settle(layer)
    spread = sharded.is_sharded(layer)
    layer.values_buffer = None if spread or not layer.caches else values.buffer(layer.weight, rule.weight, layer.gate)
    reserve_codes(layer)
    return layer
