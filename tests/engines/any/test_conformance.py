"""Every backend that is ready here obeys every law; the registry lists them, so that none is forgotten."""

from typing import Any

import pytest

import qkit
from qkit.testing import ArrayConformance, Conformance


class Numpy(ArrayConformance):
    backend = "numpy"


@pytest.mark.filterwarnings("ignore:.* should not be instantiated:DeprecationWarning")  # torch's own compiler
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
class Torchao(Conformance):
    backend = "torchao"

    def model(self) -> Any:
        from torch import manual_seed, nn

        manual_seed(0)
        return nn.Sequential(nn.Linear(256, 128), nn.GELU(), nn.Sequential(nn.Linear(128, 256)), nn.Linear(256, 64))

    def shared_model(self) -> Any:
        from torch import nn

        twice = nn.Linear(128, 128)
        return nn.Sequential(twice, nn.ReLU(), twice)

    def tied_model(self) -> Any:
        from torch import manual_seed, nn

        manual_seed(0)
        model = nn.Sequential(nn.Embedding(64, 128), nn.LayerNorm(128), nn.Linear(128, 64, bias=False))
        model[2].weight = model[0].weight
        return model

    def forward(self, model: Any, x: Any) -> Any:
        return model(x).detach()

    def gradient(self, function: Any, x: Any) -> Any:
        x = x.clone().requires_grad_()
        function(x).sum().backward()
        return x.grad


class TorchaoOnCuda(Torchao):
    tolerance = 1e-5  # products of integer codes are exact, and float ones are added in cuBLAS's order

    @property
    def engine(self) -> Any:
        return qkit.backend("torchao").on("cuda")

    def model(self) -> Any:
        return super().model().cuda()

    def shared_model(self) -> Any:
        return super().shared_model().cuda()

    def tied_model(self) -> Any:
        return super().tied_model().cuda()


class Mlx(Conformance):
    backend = "mlx"
    tolerance = 1e-5  # MLX's quantized matmul adds in another order than its float one

    def model(self) -> Any:
        import mlx.core as mx
        from mlx import nn

        mx.random.seed(0)
        return nn.Sequential(nn.Linear(256, 128), nn.GELU(), nn.Sequential(nn.Linear(128, 256)), nn.Linear(256, 64))

    def shared_model(self) -> Any:
        from mlx import nn

        twice = nn.Linear(128, 128)
        return nn.Sequential(twice, nn.ReLU(), twice)

    def forward(self, model: Any, x: Any) -> Any:
        return model(x)

    def gradient(self, function: Any, x: Any) -> Any:
        import mlx.core as mx

        return mx.grad(lambda y: function(y).sum())(x)


SUITES = {suite.backend: suite for suite in (Numpy, Torchao, Mlx)}
READY = [status.name for status in qkit.backends() if status.ready]

for name in READY:
    if name in SUITES:
        globals()[f"Test{name.capitalize()}"] = SUITES[name]

if "torchao" in READY and __import__("torch").cuda.is_available():
    TestTorchaoOnCuda = TorchaoOnCuda


def test_every_ready_backend_has_a_suite() -> None:
    assert set(READY) <= set(SUITES)


def test_numpy_is_always_ready() -> None:
    assert "numpy" in READY
