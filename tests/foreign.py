"""Models in other programs' layouts, written here from the published descriptions of those layouts, not by qkit's code."""

import json

import ml_dtypes
import numpy as np
from models import make
from safetensors.numpy import load_file, save_file

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # AutoAWQ: the place i of a word holds column AWQ_ORDER[i] of eight
BF16 = ml_dtypes.bfloat16
E4M3 = ml_dtypes.float8_e4m3fn
E8M0 = ml_dtypes.float8_e8m0fnu


def is_linear(name):
    return name.endswith(".weight") and name.split(".")[-2] in LINEAR


def rewritten(folder, encode, settings, *, family="llama", dtype="bfloat16", key="quantization_config", **changes):
    """A float model whose linear weights `encode(weight, random)` replaces by parts, and `settings` in its config.json."""
    make(folder, family, dtype=dtype, **changes)
    tensors, out = load_file(folder / "model.safetensors"), {}
    random = np.random.default_rng(3)
    for name, array in tensors.items():
        if is_linear(name):
            out |= {f"{name.removesuffix('.weight')}.{part}": x for part, x in encode(array, random).items()}
        else:
            out[name] = array
    save_file(out, folder / "model.safetensors", metadata={"format": "pt"})
    told(folder, **({key: settings} if settings else {}))
    return folder


def told(folder, **changes):
    """Changes `config.json`; None removes a key."""
    file = folder / "config.json"
    config = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))


# Bits, one number at a time


def stream(codes, bits):
    """Codes [..., n] as int32 words [..., n * bits / 32], lowest bits first."""
    flat = codes.reshape(-1, codes.shape[-1])
    out = []
    for row in flat.tolist():
        number = sum(code << (bits * i) for i, code in enumerate(row))
        out.append(np.frombuffer(number.to_bytes(len(row) * bits // 8, "little"), "<i4"))
    return np.stack(out).reshape(*codes.shape[:-1], -1)


# GPTQ and AWQ


def gptq(bits, group, *, version="gptq", order="contiguous", scale=np.float16):
    """An encoder of GPTQ: random codes, zero points and scales; and their values, by the formula of its authors."""

    def encode(weight, random):
        out, n = weight.shape
        groups = n // group
        codes = random.integers(0, 1 << bits, (out, n))
        zeros = random.integers(1, (1 << bits), (out, groups))
        scales = (random.standard_normal((out, groups)) * 0.01).astype(scale)
        g_idx = np.arange(n) // group
        if order == "permuted":
            g_idx = random.permutation(g_idx)
        elif order == "absent":
            g_idx = None
        found = {
            "qweight": np.ascontiguousarray(stream(codes, bits).T),
            "qzeros": stream((zeros - (version == "gptq")).T.astype(int), bits),
            "scales": np.ascontiguousarray(scales.T),
        }
        return found if g_idx is None else {**found, "g_idx": g_idx.astype(np.int32)}

    return encode


def awq(group=64):
    """An encoder of AutoAWQ's `gemm` version."""

    def encode(weight, random):
        out, n = weight.shape
        ordered = lambda codes: codes.reshape(*codes.shape[:-1], -1, 8)[..., list(AWQ_ORDER)].reshape(codes.shape)  # noqa: E731
        codes, zeros = random.integers(0, 16, (n, out)), random.integers(0, 16, (n // group, out))
        return {
            "qweight": stream(ordered(codes), 4),
            "qzeros": stream(ordered(zeros), 4),
            "scales": (random.standard_normal((n // group, out)) * 0.01).astype(np.float16),
        }

    return encode


# Small floats


def e4m3(random, shape):
    """Finite e4m3 codes, all of them."""
    codes = random.integers(0, 254, shape).astype(np.uint8)
    return np.where(codes & 127 == 127, np.uint8(0), codes).view(E4M3)


def fp8(block, *, scale=np.float32, name="weight_scale_inv"):
    """An encoder of fp8 with a scale for each block; `block` is rows and columns, or None for one scale."""

    def encode(weight, random):
        shape = weight.shape
        grid = () if block is None else tuple(-(-size // one) for size, one in zip(shape, block, strict=True))
        if scale is E8M0:
            scales = random.integers(110, 122, grid).astype(np.uint8).view(E8M0)
        else:
            scales = np.asarray(np.exp(random.standard_normal(grid)) * 0.001).astype(scale)
        return {"weight": e4m3(random, shape), name: scales}

    return encode


def nvfp4(*, packed="weight", scale="weight_scale", factor="weight_scale_2", size=()):
    """An encoder of NVFP4: e2m1 pairs, e4m3 per 16, and a float32 for the tensor."""

    def encode(weight, random):
        out, n = weight.shape
        scales = random.integers(1, 127, (out, n // 16)).astype(np.uint8).view(E4M3)
        number = np.float32(random.random() * (1e-3 if factor == "weight_scale_2" else 3000))
        pairs = random.integers(0, 256, (out, n // 2)).astype(np.uint8)
        return {packed: pairs, scale: scales, factor: np.full(size, number, np.float32)}

    return encode
