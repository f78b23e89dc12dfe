"""The least kernel of Triton: compiled before all others, it shows whether Triton compiles for a GPU."""

from subprocess import CalledProcessError

import torch
import triton


@triton.jit
def nothing(x):
    pass


def why_not(device: torch.device) -> str:
    """Why Triton compiles nothing for the GPU `device`, and the way out; empty where it does. Nothing is launched."""
    try:
        with torch.cuda.device(device):
            _launcher = nothing.warmup(torch.float32, grid=(1,)).run
    except CalledProcessError as error:
        return f"the C compiler of Triton fails ({error}): install the headers of Python, python3-dev"
    except Exception as error:  # Triton and its assembler have a class for each fault
        name, reason = torch.cuda.get_device_name(device), str(error).strip().partition("\n")[0]
        return f"Triton {triton.__version__} compiles nothing for {name} ({reason}): pip install --upgrade torch triton"
    return ""
