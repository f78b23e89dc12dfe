"""The layout of packed codes, by torch's operations, and the reasons for which no kernel takes them. Kernels: test_kernels.py."""

from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from qkit_torchao.arithmetic import packing, rounding, words  # noqa: E402
from qkit_torchao.kernels import choose  # noqa: E402

import qkit  # noqa: E402

GPU = torch.device("cuda")


@pytest.mark.parametrize("inputs", [16, 48, 86, 192, 1505])
@pytest.mark.parametrize("bits", words.PLANES)
def test_packed_codes_have_no_gaps_and_come_back(bits, inputs):
    codes = torch.randint(0, 1 << bits, (3, inputs), dtype=torch.uint8)
    for size in (32, 64, 128):
        packed = words.pack(codes, bits, size)
        assert packed.shape == (3, words.count(bits, inputs, size))
        assert packed.shape[1] * 32 == -(-inputs // size) * size * bits
        assert torch.equal(words.unpack(packed, bits, size, inputs), codes)


@pytest.mark.parametrize(
    "grid", ["int4-g32-signed", "int3-row-absmax", "int8-g64-minmax", "e2m1-g16-nvfp4", "e4m3-tensor-rceil"]
)
def test_what_is_laid_out_in_words_is_read_back(grid):
    q = rounding.quantize(torch.randn(4, 192), qkit.Grid.parse(grid))
    back = packing.unlay(packing.lay(q, "words"))
    assert all(
        torch.equal(part, back.parts()[name]) and part.dtype == back.parts()[name].dtype
        for name, part in q.parts().items()
    )


def test_scales_that_bfloat16_would_round_stay_as_they_are():
    scales = torch.tensor([1.0, 1 + 2**-9])
    assert packing.narrow(scales[:1]).dtype == torch.bfloat16
    assert packing.narrow(scales) is scales


def test_a_word_has_one_scale_where_units_divide_groups():
    assert [words.unit(qkit.Grid("int4", group), 768) for group in (16, 32, 96, 128, 256, "row")] == [
        16,
        32,
        32,
        128,
        128,
        128,
    ]
    assert words.unit(qkit.Grid("int3", 16), 768) == 32
    assert not words.has_one_scale(qkit.Grid("int3", 16), 768)
    assert not words.has_one_scale(qkit.Grid("int4", 24), 768)


@pytest.fixture
def _fresh():
    choose.why_no_triton.cache_clear()
    yield
    choose.why_no_triton.cache_clear()


@pytest.mark.usefixtures("_fresh")
def test_reasons_name_the_way_out(monkeypatch):
    monkeypatch.setattr(choose, "find_spec", lambda name: None)
    assert choose.why_not_packed(GPU) == "Triton is not installed: pip install 'qkit-quant[cuda]'"
    choose.why_no_triton.cache_clear()
    monkeypatch.setattr(choose, "find_spec", lambda name: name)
    monkeypatch.setattr(choose, "which", lambda name: None)
    assert choose.why_not_packed(GPU) == "Triton finds no C compiler: install gcc, or name one in CC"
    on_gpu = SimpleNamespace(is_cuda=True, device=GPU)
    assert not choose.lays_out(on_gpu, qkit.Grid("int4", 32))  # nor does it compile what quantizes
    choose.why_no_triton.cache_clear()
    monkeypatch.setattr(choose, "which", lambda name: name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    assert choose.why_not_packed(GPU) == "Tesla T4 is older than compute capability 8.0"
    assert choose.why_not_packed(torch.device("meta")) == "there are no kernels for packed codes on the meta"
