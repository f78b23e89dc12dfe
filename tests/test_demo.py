"""The demo from end to end at a tiny size, on every engine that can train."""

import json
from dataclasses import replace

import pytest

import qkit
from qkit import demo

ENGINES = [status.name for status in qkit.backends() if status.ready and hasattr(qkit.backend(status.name), "trainer")]
TINY = replace(demo.PRESET, hidden=64, layers=1, intermediate=128, batch=2, length=32, float_steps=12, more_steps=6)


@pytest.mark.parametrize("name", ENGINES)
def test_the_demo_goes_the_whole_way(name, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "PRESETS", dict.fromkeys(ENGINES, TINY))
    seen = []
    result = demo.run(
        backend=name, recipe="int2-g64", folder=tmp_path, progress=lambda stage, step, steps, loss: seen.append(stage)
    )
    assert seen == ["float"] * 12 + ["float, longer"] * 6 + ["QAT"] * 6
    assert result.codes_equal == result.codes_compared > 100_000
    assert result.forward_difference == 0.0
    assert set(result.engines) == {"numpy", *ENGINES}
    if result.other_loss is not None:
        assert result.other_loss == pytest.approx(result.qat_loss, abs=1e-5)  # two libraries, two orders of summation
    assert {entry.name for entry in tmp_path.iterdir()} == {"float", "quantized", "result.json"}
    assert json.loads((tmp_path / "result.json").read_text())["backend"] == name
    pytest.importorskip("matplotlib")
    assert demo.draw(result, tmp_path / "losses.png")
    assert (tmp_path / "losses.png").read_bytes().startswith(b"\x89PNG")


def test_numpy_cannot_train_and_says_so(tmp_path):
    with pytest.raises(qkit.BackendError, match="backend 'numpy' cannot train"):
        demo.run(backend="numpy", recipe="int2-g64", folder=tmp_path, progress=lambda *_: None)
