"""Whether two things are the same, bit for bit: arrays, maps of arrays, and the files of two directories."""

import numpy as np

import qkit


def equal(a, b):
    """Whether two arrays of MLX have one type and equal numbers; NaN equals NaN."""
    to_numpy = qkit.backend("mlx").to_numpy
    return a.dtype == b.dtype and np.array_equal(to_numpy(a), to_numpy(b), equal_nan=True)


def same(one, other):
    """Whether two maps hold equal arrays under equal names."""
    return one.keys() == other.keys() and all(np.array_equal(one[key], other[key]) for key in one)


def contents(folder):
    """The bytes of each file of `folder` by name; None where there is no folder."""
    return {entry.name: entry.read_bytes() for entry in sorted(folder.iterdir())} if folder.exists() else None
