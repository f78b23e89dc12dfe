"""Products in float32 for the formats that vLLM's CPU build has no kernel for, to see what its loader and schemes make of a file.

vLLM reads the configuration, chooses the scheme, loads and fuses the tensors itself. Only the last step is replaced: the product,
from the tensors that the scheme would give to its kernel.
"""

from importlib import import_module

import torch
from torch.nn import functional as F

SCHEMES = "vllm.model_executor.layers.quantization.compressed_tensors.schemes.compressed_tensors_"
EMBEDDING = "vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_embedding"
MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


class Product:
    """A kernel by the names that vLLM calls: values once after loading, a float32 product at each call."""

    def __init__(self, *_, **__):
        self.config = type("Config", (), {})()

    def input_quant_key(self):
        """None: the kernel takes inputs as they are."""

    def process_weights_after_loading(self, layer):
        """Computes the values of the layer."""
        layer.reference = self.values(layer)

    def apply_weights(self, layer, x, bias=None):
        """x [..., inputs] -> [..., outputs]."""
        return F.linear(x.float(), layer.reference, None if bias is None else bias.float()).to(x.dtype)


class Nvfp4(Product):
    def values(self, layer):
        blocks = e2m1(layer.weight.data).unflatten(1, (-1, 16)) * layer.weight_scale.data.float()[..., None]
        return blocks.flatten(1) * layer.weight_global_scale.data.float()


class Mxfp4(Product):
    def values(self, layer):
        return (e2m1(layer.weight.data).unflatten(1, (-1, 32)) * powers(layer.weight_scale.data)).flatten(1)


class Mxfp8(Product):
    def values(self, layer):
        return (layer.weight.data.float().unflatten(1, (-1, 32)) * powers(layer.weight_scale.data)).flatten(1)


class Float8(Product):
    def values(self, layer):
        return (layer.weight.data.float() * layer.weight_scale.data.float().reshape(1, -1)).t().contiguous()


class Integers(Product):
    """Packed integers with or without zero points, of any width."""

    def __init__(self, config, w_q_param_name, w_s_param_name, w_zp_param_name=None):
        self.given, self.names = config, (w_q_param_name, w_s_param_name, w_zp_param_name)

    def values(self, layer):
        bits, inputs = self.given.weight_type.size_bits, self.given.partition_weight_shape[0]
        packed, scale = (getattr(layer, name).data for name in self.names[:2])
        codes = unpacked(packed, bits, inputs).unflatten(1, (scale.shape[1], -1))
        zero = 2 ** (bits - 1)
        if self.given.zero_points:
            zero = unpacked(getattr(layer, self.names[2]).data.t(), bits, len(packed)).t()[..., None]
        return ((codes - zero) * scale.float()[..., None]).flatten(1)


def e2m1(pairs):
    """Bytes [rows, n / 2], the low nibble first -> values [rows, n]."""
    codes = torch.stack([pairs & 15, pairs >> 4], -1).flatten(1).long()
    return torch.tensor(MAGNITUDES)[codes & 7] * (1 - 2 * (codes >> 3))


def powers(codes):
    """E8M0 codes [rows, groups] -> float32 [rows, groups, 1]."""
    return torch.exp2(codes.float() - 127)[..., None]


def unpacked(words, bits, count):
    """int32 words [rows, words], a stream of bits -> codes [rows, count] as float32."""
    stream = ((words[..., None].long() >> torch.arange(32)) & 1).flatten(1)[:, : count * bits]
    return (stream.unflatten(1, (count, bits)) << torch.arange(bits)).sum(-1).float()


def gather(tokens, packed, scale, hidden, bits):
    """Rows of a packed embedding, as vLLM's Triton kernel gives them."""
    codes = unpacked(packed[tokens], bits, hidden) - 2 ** (bits - 1)
    return (codes.unflatten(1, (scale.shape[1], -1)) * scale[tokens].float()[..., None]).flatten(1).to(scale.dtype)


def install():
    """Puts these products in the place of vLLM's kernels."""
    nvfp4 = import_module(SCHEMES + "w4a4_nvfp4")
    nvfp4.init_nvfp4_linear_kernel, nvfp4.expose_input_quant_key = (lambda **_: Nvfp4()), (lambda *_: None)
    import_module(SCHEMES + "w4a4_mxfp4").init_mxfp4_linear_kernel = lambda **_: Mxfp4()
    import_module(SCHEMES + "w8a8_mxfp8").init_mxfp8_linear_kernel = lambda **_: Mxfp8()
    import_module(SCHEMES + "w8a16_fp8").init_wfp8_a16_linear_kernel = lambda **_: Float8()
    import_module(SCHEMES + "wNa16").choose_mp_linear_kernel = lambda _: Integers
    import_module(EMBEDDING)._dequant_gather_triton = gather  # noqa: SLF001  vLLM's Triton kernel
