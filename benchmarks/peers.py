"""The distance of qkit's rules from other tools', and of 8-bit `minmax` from an unrounded scale: the numbers of numerics.md.

Usage: python benchmarks/peers.py [--out FILE.json]
"""

import argparse
from pathlib import Path

import ml_dtypes
import numpy as np
import torch
from compressed_tensors.quantization import QuantizationScheme, preset_name_to_scheme
from compressed_tensors.quantization.lifecycle.forward import quantize
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from measure import Report

import qkit
from qkit import reference
from qkit.grid import Grid
from qkit.reference import packing, rounding

SHAPE = (1024, 4096)
SCHEMES = ("W4A16", "W4A16_ASYM", "W8A16", "MXFP4A16", "MXFP8A16", "NVFP4A16")
GROUPS = (32, 64, 128)


def weight(dtype, shape=SHAPE, deviation=0.02):
    """Normal weights like those of a layer, on the grid of `dtype`, as float32."""
    drawn = np.random.default_rng(0).standard_normal(shape, np.float32) * np.float32(deviation)
    return drawn.astype(ml_dtypes.bfloat16).astype(np.float32) if dtype == "bfloat16" else drawn


def theirs(x, scheme: QuantizationScheme):
    """compressed-tensors' codes of torch tensor `x` [outputs, inputs] as float32, and its scales, by its own functions."""
    arguments = scheme.weights
    grouped = x.unflatten(-1, (-1, arguments.group_size))
    low, high = grouped.amin(-1), grouped.amax(-1)
    whole = None
    if arguments.strategy == "tensor_group":
        whole = generate_gparam(x.amin(), x.amax())
    scale, zero = calculate_qparams(low, high, arguments, global_scale=whole)
    codes = quantize(x, scale, zero, arguments, global_scale=whole)
    return codes.float().numpy(), scale.float().numpy()


def ours(x, grid):
    """qkit's codes as compressed-tensors counts them, and its scales."""
    q = qkit.quantize(x, grid)
    scales = reference.scale_values(q)
    if grid.element.kind == "float":
        return rounding.float_values(q.codes, grid.element), scales
    codes = q.codes if q.zeros is None else packing.signed(q.codes, grid.element)
    return codes.astype(np.float32), scales


def compare(name, dtype, grid):
    """Shares of codes, of scales and of groups with an unlike scale, over `weight(dtype)`."""
    x = weight(dtype)
    narrow = x.astype(ml_dtypes.bfloat16) if dtype == "bfloat16" else x
    their_codes, their_scales = theirs(torch.from_numpy(x).to(getattr(torch, dtype)), preset_name_to_scheme(name, []))
    our_codes, our_scales = ours(narrow, grid)
    row = {
        "scheme": name,
        "recipe": str(grid),
        "dtype": dtype,
        "codes": float((our_codes != their_codes).mean()),
    }
    if grid.scale != "nvfp4":  # theirs are products of two: they have no like
        row["scales"] = float((our_scales != their_scales).mean())
    return row


def spread_weights(dtype):
    """Normal weights of eight standard deviations over an octave: shares depend on where peaks lie between powers of two."""
    for i in range(8):
        yield weight(dtype, (256, 4096), 0.02 * 2 ** (i / 8))


def minmax(bits, group, dtype):
    """The cost of rounding the scale of `minmax` to 8 significant bits."""
    grid, found = Grid(f"int{bits}", group, "minmax"), []
    for w in spread_weights(dtype):
        x = rounding.group(w, grid).astype(np.float64)
        s, z = rounding.asymmetric_scale(x.astype(np.float32), grid.element)
        raw = np.rint(x / s[..., None]) + z[..., None]
        error = np.abs((np.clip(raw, 0, grid.element.levels) - z[..., None]) * s[..., None] - x)
        low, high = np.minimum(x.min(-1), 0), np.maximum(x.max(-1), 0)
        step = ((high - low) / grid.element.levels)[..., None]
        zero = np.rint(-low[..., None] / step)
        unrounded = (np.clip(np.rint(x / step) + zero, 0, grid.element.levels) - zero) * step - x
        found.append(
            {
                "groups_that_clip": float((raw.max(-1) > grid.element.levels).mean()),
                "groups_over_one_step": float((error > s[..., None]).any(-1).mean()),
                "largest_error_in_steps": float((error / s[..., None]).max()),
                "rmse_over_unrounded": float(np.sqrt((error**2).mean() / (unrounded**2).mean()) - 1),
            }
        )
    return {"bits": bits, "group": group, "dtype": dtype, **summary(found)}


def summary(found):
    """Mean and range of each figure."""
    columns = {key: [row[key] for row in found] for key in found[0]}
    return {
        key: {"mean": float(np.mean(column)), "range": [min(column), max(column)]} for key, column in columns.items()
    }


def symmetric(bits, group, rule):
    """RMSE of a symmetric rule over that of its unrounded scale, less one."""
    grid, found = Grid(f"int{bits}", group, rule), []
    element = grid.element
    divisor = {"signed": element.lowest, "absmax": element.highest, "midmax": element.highest + 0.5}[rule]
    for w in spread_weights("float32"):
        x = rounding.group(w, grid).astype(np.float64)
        high, low = x.max(-1), x.min(-1)
        peak = np.where(high >= -low, high, low) if rule == "signed" else np.abs(x).max(-1)
        wrong = []
        for scale in (rounding.symmetric_scale(x.astype(np.float32), grid).astype(np.float64), peak / divisor):
            q = np.clip(np.rint(x / scale[..., None]), element.lowest, element.highest)
            wrong.append(((q * scale[..., None] - x) ** 2).mean())
        found.append({"rmse_over_unrounded": float(np.sqrt(wrong[0] / wrong[1]) - 1)})
    return {"bits": bits, "group": group, "rule": rule, **summary(found)}


def main():
    """Measures all."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    weights = f"normal; schemes: deviation 0.02, {list(SHAPE)}; the others: eight from 0.02 to 0.037, [256, 4096]"
    report = Report(given.out, packages=("compressed-tensors",), about={"weights": weights})
    tables = {
        "compressed_tensors": [
            *(
                compare(name, dtype, next(r.weight for r in qkit.recipe(name).rules if r.weight))
                for name in SCHEMES
                for dtype in ("float32", "bfloat16")
            ),
            *(compare("MXFP8A16", dtype, Grid("e4m3", 32, "even")) for dtype in ("float32", "bfloat16")),
        ],
        "minmax": [
            minmax(bits, group, dtype) for bits in (4, 8) for group in GROUPS for dtype in ("float32", "bfloat16")
        ],
        "symmetric": [
            symmetric(bits, group, rule)
            for bits in (4, 8)
            for group in GROUPS
            for rule in ("signed", "absmax", "midmax")
        ],
    }
    for table, rows in tables.items():
        for row in rows:
            report.add({"table": table, **row})
    report.finish()


if __name__ == "__main__":
    main()
