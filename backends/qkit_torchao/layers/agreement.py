"""Processes that train one model must have one recipe: asks them in the first forward of training, and after a change of grids.

Gradients are averaged over processes, so that different grids would train a model that no process deploys, in silence.
"""

from itertools import chain
from typing import Any

from torch import distributed, nn

from qkit.errors import StageError
from qkit_torchao.layers import sharded
from qkit_torchao.layers.spread import agree, rule_text
from qkit_torchao.torch_private import active_ddp

WAY_OUT = "prepare the model by the same recipe in every process"


def want_one_recipe(layer: Any) -> None:
    """Refuses processes whose layers differ in rules or adapters: under DDP all layers of the model at once, under FSDP2 each.

    Layers whose `asked` is true have been asked. Compiled code asks nobody, and does not look at `asked`, so that nothing is
    compiled anew. Other ways to train a model in several processes are not looked at.

    Raises:
        StageError: they differ; or DeepSpeed has partitioned a parameter of `layer`.
    """
    if not layer.training:
        return
    for parameter in layer.parameters(recurse=False):
        sharded.want_partitioned_by_none(parameter)
    layer.asked, device = True, next(chain(layer.parameters(), layer.buffers())).device
    if not (distributed.is_available() and distributed.is_initialized()):
        return
    if sharded.is_managed(layer):
        text = _text("", layer)
        if not agree(text, device, sharded.groups_of_data(layer)):
            raise StageError(f"processes disagree on a layer, which is{text} in this one: {WAY_OUT}")
    elif (ddp := active_ddp()) is not None:
        layers = [(path, module) for path, module in ddp.module.named_modules() if hasattr(module, "asked")]
        text = "\n".join(_text(path, module) for path, module in layers)
        if not agree(text, device, [ddp.process_group]):
            kinds = "; ".join(sorted({_text("", module).strip() for _, module in layers}))
            raise StageError(
                f"processes disagree on the layers of a model, of which this one has {len(layers)}, {kinds}: {WAY_OUT}"
            )
        for _, module in layers:
            module.asked = True


def _text(path: str, layer: nn.Module) -> str:
    scale, dithered = getattr(layer, "lora_scale", None), getattr(layer, "lora_dithered", None)
    adapter = "" if scale is None else f", adapter times {scale}{' on spread codes' if dithered else ''}"
    trained = sorted(name for name, one in layer.named_parameters(recurse=False) if one.requires_grad)
    return f"{path} {rule_text(layer.rule)}{adapter}, training {', '.join(trained) or 'nothing'}"
