"""Ways of quantizing that qkit does not read: why, and the way out of each."""

from typing import Final

PUBLISHER: Final = "take the float model, or the same model in a layout that qkit reads"

#: By `quant_method`.
REFUSED: Final = {
    "aqlm": f"its codes are indices into learned codebooks: {PUBLISHER}",
    "vptq": f"its codes are indices into learned codebooks: {PUBLISHER}",
    "quanto": f"transformers saves no such model, and quanto's own classes decode what quanto saves: {PUBLISHER}",
    "eetq": f"its weights lie in the order of one kernel: {PUBLISHER}",
    "higgs": f"its weights are rotated, and its codes are indices into a table: {PUBLISHER}",
    "hqq": f"its zero points are floats that no grid has, and its values those of HQQ's own kernels in 16 bits: {PUBLISHER}",
    "gguf": "its weights are in a GGUF file: qkit import FILE.gguf OUT reads that",
    "bitnet": f"its layers normalize their inputs too: {PUBLISHER}",
    "spqr": f"its outliers are stored apart: {PUBLISHER}",
    "fp_quant": f"its weights are rotated: {PUBLISHER}",
    "metal": f"its weights lie in the order of one kernel: {PUBLISHER}",
    "fouroversix": f"each of its blocks has a target of its own: {PUBLISHER}",
    "sinq": f"its rows and columns have scales: {PUBLISHER}",
    "gemma": f"its classes alone decode it: {PUBLISHER}",
    "nvfp4": "transformers quantizes such a model while it loads, and its files are float: remove the quantization_config",
    "mxfp8": f"transformers' own class decodes it: {PUBLISHER}",
    "deepspeedfp": f"DeepSpeed quantizes such a model while it loads: {PUBLISHER}",
    "quip": f"its weights are rotated, and its codes are indices into a table: {PUBLISHER}",
    "exl2": f"each of its rows has a width of its own: {PUBLISHER}",
    "exl3": f"its codes are states of a trellis: {PUBLISHER}",
    "marlin": f"its weights lie in the order of one kernel: {PUBLISHER}",
    "squeezellm": f"its codes are indices into a table: {PUBLISHER}",
}
