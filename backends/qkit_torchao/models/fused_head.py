"""Output heads under trainers that read a head's weight and never call the head, as TRL's do with `fused_lm_head=True`.

There the weight that they read is the values that the head computes with. Known from TRL 1.16, `trl/trainer/utils.py`.
"""

from types import SimpleNamespace
from typing import Any
from weakref import WeakSet

from torch import Tensor, nn

from qkit.errors import StageError
from qkit_torchao.layers import converted, sharded
from qkit_torchao.layers.adapted import AdaptedPacked
from qkit_torchao.layers.converted import PackedLinear
from qkit_torchao.layers.prepared import FakeLinear
from qkit_torchao.torch_private import parameter

FUSED = "fused_lm_head"  #: TRL's own argument of a forward
GETTER = "get_output_embeddings"


def watch_head(model: nn.Module) -> None:
    """Has trainers that read the weight of the output head of `model` read its values. `model` may be wrapped by peft.

    Raises:
        StageError: in such a forward: the head quantizes its input or output, or its weight is sharded.
    """
    if model not in _watched and isinstance(_head(_owner(model)), FakeLinear | PackedLinear):
        model.register_forward_pre_hook(_before, with_kwargs=True)
        model.register_forward_hook(_after, with_kwargs=True, always_call=True)
        _watched.add(model)


def _before(model: nn.Module, arguments: Any, named: dict[str, Any]) -> None:
    if not named.get(FUSED):
        return
    owner = _owner(model)
    head = _head(owner)
    if isinstance(head, FakeLinear | PackedLinear):
        stand = SimpleNamespace(weight=_values(head), bias=head.bias)
        owner.__dict__[GETTER] = lambda: stand


def _after(model: nn.Module, arguments: Any, named: dict[str, Any], output: Any) -> None:
    if named.get(FUSED):
        _owner(model).__dict__.pop(GETTER, None)


def _values(head: Any) -> Tensor:
    """The values of the weight of `head`, with their gradient."""
    rule = head.rule
    if rule.activation or rule.output:
        raise StageError(
            f"this trainer reads the weight of the output head, whose rule quantizes {rule.activation or rule.output} as well, "
            "and would train without that: leave the head float, or train without TRL"
        )
    if isinstance(head, AdaptedPacked):
        return head.values_of_merged()
    if isinstance(head, PackedLinear):
        return converted.values(head, head.weight.dtype)
    if sharded.is_sharded(head):
        raise StageError(
            "this trainer reads the weight of the output head, which is quantized and sharded: leave the head float"
        )
    weight = parameter(head, "weight")
    assert weight is not None
    return head.weight_values(weight.dtype)  # type: ignore[no-any-return]


def _owner(model: Any) -> Any:
    """The model of transformers that `model` is or wraps."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _head(model: Any) -> Any:
    try:
        return getattr(model, GETTER)()
    except (AttributeError, NotImplementedError):  # of models without one
        return None


_watched: WeakSet[nn.Module] = WeakSet()
