"""Data parallel in MLX: two processes on the CPU, over its ring of sockets."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core", reason="mlx is not installed")
if not mx.distributed.is_available("ring"):
    pytest.skip("this build of mlx has no ring", allow_module_level=True)

import rings  # noqa: E402


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ring")
    free = [socket.socket() for _ in range(2)]
    for one in free:
        one.bind(("127.0.0.1", 0))
    hosts = [[f"127.0.0.1:{one.getsockname()[1]}"] for one in free]
    for one in free:
        one.close()
    (folder / "hosts.json").write_text(json.dumps(hosts))
    command = [sys.executable, str(Path(__file__).parents[2] / "rings.py"), str(folder)]
    environments = [{**os.environ, "MLX_RANK": str(n), "MLX_HOSTFILE": str(folder / "hosts.json")} for n in range(2)]
    running = [subprocess.Popen(command, env=environment) for environment in environments]
    assert [one.wait(timeout=120) for one in running] == [0, 0]
    return [dict(np.load(folder / f"{n}.npz")) for n in range(2)]


def test_both_processes_train_the_same_weights(ranks):
    assert [int(one["size"]) for one in ranks] == [2, 2]
    assert set(ranks[0]) == set(ranks[1]) > {"losses", "size"}
    for name, array in ranks[0].items():
        assert (array == ranks[1][name]).all() == (name != "losses")


def test_they_are_those_of_one_process_on_the_whole_batch(ranks):
    weights, losses = rings.train(1, 0, lambda gradients: gradients)
    for name, array in weights.items():
        np.testing.assert_allclose(ranks[0][name], array, rtol=0, atol=1e-5)  # gradients are summed in another order
    np.testing.assert_allclose((ranks[0]["losses"] + ranks[1]["losses"]) / 2, losses, rtol=1e-5)
