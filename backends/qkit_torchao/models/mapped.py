"""Float models whose weights are maps of their files: only the running block is in memory. They are read, never written."""

import warnings
from collections.abc import Callable, Mapping
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn


def build(config: Mapping[str, Any]) -> nn.Module:
    """As `huggingface.build`, on the host; memory of large parameters is never touched.

    Raises:
        BackendError: as `huggingface.build`.
    """
    from qkit_torchao.models import huggingface  # here, so that the engine starts without transformers

    with huggingface.uninitialized():
        model: Any = huggingface.build(config)
    model.tie_weights()  # which comes with the values
    return cast(nn.Module, model)


def give(tensor: Tensor, array: NDArray[Any], to_tensor: Callable[[NDArray[Any]], Tensor]) -> None:
    """Makes a parameter the map of `array`; buffers and other types are copied by `to_tensor`."""
    if not isinstance(tensor, nn.Parameter) or array.dtype.name != str(tensor.dtype).removeprefix("torch."):
        tensor.data.copy_(to_tensor(array))
        return
    plain = array.view(np.int16) if array.dtype.name == "bfloat16" else array
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the file is not to be written: nobody writes these weights
        mapped = torch.from_numpy(np.asarray(plain))
    tensor.data = mapped.view(torch.bfloat16) if array.dtype.name == "bfloat16" else mapped


def lend(model: nn.Module, blocks: nn.ModuleList, device: torch.device) -> None:
    """Moves a model on the host to `device`, but for the parameters of its blocks: they are there only while a block runs."""
    resting = {id(parameter) for parameter in blocks.parameters()}
    for tensor in (*model.buffers(), *(one for one in model.parameters() if id(one) not in resting)):
        tensor.data = tensor.data.to(device)
    for block in blocks:
        _lend_block(block, device)


def _lend_block(block: nn.Module, device: torch.device) -> None:
    home: dict[nn.Parameter, Tensor] = {}

    def enter(*_: Any) -> None:
        for parameter in block.parameters():
            home[parameter] = parameter.data
            parameter.data = parameter.data.to(device)

    def leave(*_: Any) -> None:
        for parameter, tensor in home.items():
            parameter.data = tensor
        home.clear()

    block.register_forward_pre_hook(enter)
    block.register_forward_hook(leave, always_call=True)
