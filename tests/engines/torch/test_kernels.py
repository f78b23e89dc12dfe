"""The CUDA kernels without CUDA: Triton's interpreter runs them, in a process of its own, beside the reference.

The interpreter divides where the kernels do not; what they do instead is counted out here, for every mantissa there is.
"""

import subprocess
import sys
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

import products_on_host  # noqa: E402

import qkit  # noqa: E402

pytestmark = pytest.mark.skipif(not find_spec("triton"), reason="Triton is not installed")

SCRIPT = Path(__file__).parents[2] / "interpreted.py"


@pytest.mark.parametrize(
    "dtype", ["bfloat16"]
)  # the other types differ in how they are read; they are compared on GPUs
def test_kernels_are_the_reference_bit_for_bit(dtype):
    done = subprocess.run([sys.executable, str(SCRIPT), dtype], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert len(lines) > 35
    assert [line for line in lines if not line.endswith(" exact")] == []


@pytest.mark.skipif(products_on_host.COMPILER is None, reason="no C++ compiler")
@pytest.mark.parametrize(
    ("dtype", "least"),
    [("bfloat16", 40), *(pytest.param(other, 10, marks=pytest.mark.size) for other in ("float16", "float32"))],
)
def test_kernels_on_packed_codes_multiply_what_decodes_bit_for_bit(dtype, least):
    script = SCRIPT.with_name("interpreted_words.py")
    done = subprocess.run([sys.executable, str(script), dtype], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert len(lines) > least
    assert [line for line in lines if not line.endswith((" near", " exact"))] == []


@pytest.mark.skipif(products_on_host.COMPILER is None, reason="no C++ compiler")
@pytest.mark.parametrize("eights", [1, 2, 4, 8])
@pytest.mark.parametrize("outputs", [1024, 4096, 14336])
@pytest.mark.parametrize("element", ["int3", "int4"], ids=["two planes", "one plane"])
def test_products_of_large_layers_compile_with_the_memory_that_a_program_has(element, outputs, eights):
    from qkit_torchao.kernels import cuda_words, geometry

    grid = qkit.Grid(element, 64)
    stride = 4096 * grid.element.bits // 32
    constants, _, _ = geometry.product_geometry(grid, 4096, outputs, stride, eights, True, 132)
    known = dict(constants)
    copies = known["WARPS"] * 2 * known["TILES"] * 32 * (32 if known["LOW"] else 16)
    sums = known["WARPS"] * 16 * known["TILES"] * 8 * eights * 4
    assert (copies * 2 if eights > 1 else 0) <= 48 * 1024  # one copy is on its way while another is read
    assert sums <= 48 * 1024
    host = products_on_host.HostKernel(cuda_words.PRODUCT)
    host.compile({"XS": 0, "SCALES": 0, "ZEROS": 0, "BIASES": 0, **known})


@pytest.mark.skipif(products_on_host.COMPILER is None, reason="no C++ compiler")
@pytest.mark.parametrize("outputs", [1024, 4096, 14336])
@pytest.mark.parametrize("element", ["int3", "int4", "int8"])
def test_products_of_one_row_compile_with_the_memory_that_a_program_has(element, outputs):
    from qkit_torchao.kernels import cuda_words, geometry

    grid = qkit.Grid(element, 64)
    stride = 14336 * grid.element.bits // 32
    constants, _, _ = geometry.product_geometry(grid, 14336, outputs, stride, 0, True, 132, 1)
    known = dict(constants)
    kept = 32 * 16 + 14336 * 2 if known["KEEPS"] else 0
    assert kept + known["WARPS"] * 16 * known["TILES"] * 2 * 4 <= 48 * 1024
    assert known["KEEPS"] == (element == "int4" and outputs == 4096)
    host = products_on_host.HostKernel(cuda_words.FEW_ROWS)
    host.compile({"XS": 0, "SCALES": 0, "ZEROS": 0, "BIASES": 0, **known})


def test_biases_are_added_by_an_operation_of_its_own_and_tensor_scales_divide_exactly():
    """Triton would join a product with a sum, multiply float16 as such, and divide approximately: other values than the law's."""
    from qkit_torchao.kernels import triton_tiles, triton_unpack

    for grid, biases, power in (
        (qkit.Grid("int4", 64, "affine"), "*fp16", None),
        (qkit.Grid("e2m1", 16, "stored-nvfp4-inverse"), None, "*fp32"),
    ):
        scales = "*u8" if power else "*fp16"
        for kernel, tail in (
            (triton_tiles.decode, ("bfloat16", 4, 256, False)),
            (triton_unpack.decode, (16, 256, False)),
        ):
            text = assembly(kernel, grid, [scales, None, power, biases], tail)
            assert "fma." not in text
            assert "mul.f16" not in text
            assert ("add.rn.f32" in text) == bool(biases)
            assert ("div.rn.f32" in text) == bool(power)
            assert "div.full" not in text


def assembly(kernel, grid, parts, tail):
    """The assembly of a kernel that decodes codes on `grid`, for a GPU of compute capability 9.0."""
    import triton
    from qkit_torchao.kernels.geometry import geometry
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    given = [
        "*i32",
        *parts,
        "*i32" if "bfloat16" in tail else "*fp32",
        "i32",
        "i32",
        *geometry(grid, 4096).values(),
        *tail,
    ]
    kinds = {
        name: one if str(one)[:1] == "*" or one == "i32" else "constexpr"
        for name, one in zip(kernel.arg_names, given, strict=True)
    }
    constants = {
        (i,): one for i, (one, kind) in enumerate(zip(given, kinds.values(), strict=True)) if kind == "constexpr"
    }
    source = ASTSource(fn=kernel, signature=kinds, constexprs=constants)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4}).asm["ptx"]


@pytest.mark.parametrize(("capability", "attributes"), [((8, 0), 0), ((8, 9), 0), ((9, 0), 1), ((10, 0), 1)])
def test_kernels_begin_early_only_on_devices_that_can(monkeypatch, capability, attributes):
    from qkit_torchao.kernels import nvrtc

    launched = []
    driver = SimpleNamespace(
        CUlaunchConfig=lambda: SimpleNamespace(numAttrs=0),
        CUlaunchAttribute=lambda: SimpleNamespace(value=SimpleNamespace()),
        CUlaunchAttributeID=SimpleNamespace(CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION=6),
        cuLaunchKernel=lambda *_: launched.append(SimpleNamespace(numAttrs=0)) or (0,),
        cuLaunchKernelEx=lambda config, *_: launched.append(config) or (0,),
    )
    package, bindings = ModuleType("cuda"), ModuleType("cuda.bindings")
    bindings.driver = driver
    package.bindings = bindings
    monkeypatch.setitem(sys.modules, "cuda", package)
    monkeypatch.setitem(sys.modules, "cuda.bindings", bindings)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 0)
    monkeypatch.setattr("torch.cuda.current_stream", lambda device: SimpleNamespace(cuda_stream=0))
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: capability)
    monkeypatch.setattr(nvrtc.Kernel, "_load", lambda *_: None)
    nvrtc.capability.cache_clear()
    try:
        nvrtc.Kernel("few.cu", "multiply_few", (), early=True)((), (1, 1), 32, ())
    finally:
        nvrtc.capability.cache_clear()
    assert [config.numAttrs for config in launched] == [attributes]


def test_without_nvrtc_the_way_out_is_named(monkeypatch):
    from qkit_torchao.kernels import nvrtc

    def missing():
        raise RuntimeError("libnvrtc.so.13 is not found\nsearched everywhere")

    package, bindings = ModuleType("cuda"), ModuleType("cuda.bindings")
    bindings.nvrtc = SimpleNamespace(nvrtcVersion=missing)
    package.bindings = bindings
    monkeypatch.setitem(sys.modules, "cuda", package)
    monkeypatch.setitem(sys.modules, "cuda.bindings", bindings)
    gpu = torch.device("cuda", 0)
    nvrtc.why_not.cache_clear()
    try:
        for cuda, version, package in (
            ("13.0", "13.2.0", "nvidia-cuda-nvrtc"),
            ("12.8", "12.9.1", "nvidia-cuda-nvrtc-cu12"),
            ("12.8", "13.2.0", "'cuda-bindings==12.*'"),
        ):
            monkeypatch.setattr(torch.version, "cuda", cuda)
            bindings.__version__ = version
            assert nvrtc.why_not(gpu) == f"NVRTC does not load (libnvrtc.so.13 is not found): pip install {package}"
            nvrtc.why_not.cache_clear()
        monkeypatch.setitem(sys.modules, "cuda.bindings", None)
        assert "pip install 'qkit-quant[cuda]'" in nvrtc.why_not(gpu)
    finally:
        nvrtc.why_not.cache_clear()


def test_a_gpu_that_nvrtc_does_not_know_is_named_and_gets_no_products(monkeypatch):
    from qkit_torchao.kernels import choose, cuda_words, nvrtc
    from qkit_torchao.layers import execution

    package, bindings = ModuleType("cuda"), ModuleType("cuda.bindings")
    bindings.nvrtc = SimpleNamespace(nvrtcVersion=lambda: (0, 13, 0), nvrtcGetSupportedArchs=lambda: (0, [80, 90, 120]))
    bindings.__version__ = "13.0.1"
    package.bindings = bindings
    monkeypatch.setitem(sys.modules, "cuda", package)
    monkeypatch.setitem(sys.modules, "cuda.bindings", bindings)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "NVIDIA New")
    monkeypatch.setattr(choose, "why_not_packed", lambda device: "")
    monkeypatch.setattr(choose, "word_kernels", lambda device: cuda_words)
    rule, gpu = qkit.recipe("int4-g32").rules[-1], torch.device("cuda", 0)
    for capability, native in (((9, 0), True), ((13, 1), False)):
        monkeypatch.setattr("torch.cuda.get_device_capability", lambda device, capability=capability: capability)
        nvrtc.why_not.cache_clear()
        execution.choose_execution.cache_clear()
        try:
            made = execution.choose_execution(rule, device=gpu, dtype="bfloat16", shape=(64, 64))
        finally:
            nvrtc.why_not.cache_clear()
            execution.choose_execution.cache_clear()
        assert made.native == native
    way_out = "NVRTC 13.0 has no NVIDIA New, of compute capability 13.1: pip install --upgrade nvidia-cuda-nvrtc"
    assert made.text == f"by one pass of a Triton kernel over packed codes, then cuBLAS; {way_out}"
    assert made.layout == "words"


def test_a_gpu_that_triton_does_not_know_is_named_and_its_weights_are_quantized_by_torch(monkeypatch):
    from qkit_torchao.kernels import choose, triton_trial

    def fails(*_, **__):
        raise RuntimeError("no such target: sm_131\nand more")

    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (13, 1))
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "NVIDIA New")
    monkeypatch.setattr("torch.cuda.device", lambda device: nullcontext())
    monkeypatch.setattr(choose, "which", lambda name: name)
    monkeypatch.setattr(triton_trial, "nothing", SimpleNamespace(warmup=fails))
    weight = SimpleNamespace(is_cuda=True, device=torch.device("cuda", 0))
    choose.why_no_triton.cache_clear()
    try:
        assert "compiles nothing for NVIDIA New (no such target: sm_131): pip install" in choose.why_not_packed(
            weight.device
        )
        assert not choose.lays_out(weight, qkit.Grid("int4", 32))
        assert not choose.packs(qkit.Grid("int4", 32), weight.device)
    finally:
        choose.why_no_triton.cache_clear()


def test_a_mended_reciprocal_is_the_rounded_one_of_every_mantissa_of_8_bits():
    s = np.arange(128, 256, dtype=np.float64)
    want = (1 / s).astype(np.float32)
    for units in range(-3, 4):  # how far off the hardware's quotient may be, and one more
        r = (want.view(np.int32) + units).view(np.float32).astype(np.float64)
        remainder = (1 - s * r).astype(np.float32).astype(np.float64)  # s * r has 32 bits: exact
        assert ((r + remainder * r).astype(np.float32) == want).all()


@pytest.mark.parametrize("bits", [8, 11], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("steps", [8, 4], ids=["integers", "nvfp4"])
def test_a_quotient_rounded_to_fine_steps_first_rounds_as_the_exact_one(bits, steps):
    x = np.arange(2 ** (bits - 1), 2**bits, dtype=np.float64)
    x = (x * 2.0 ** np.arange(-bits - 10, 17 - bits)[:, None]).reshape(-1)
    for s in np.arange(2 ** (steps - 1), 2**steps, dtype=np.float64):
        near = np.concatenate([x, -x])[np.abs(np.concatenate([x, -x]) / s) < 256]
        r = np.float64(np.float32(1 / s))
        exact, fine = (near / s).astype(np.float32), (near * r + 768).astype(np.float32)
        if steps == 8:
            assert (np.rint(exact) == fine + np.float32(12582912 - 768) - np.float32(12582912)).all()
        else:
            assert (_e2m1(exact) == _e2m1(fine - np.float32(768))).all()


def _e2m1(y):
    """As `kernels.small_float`."""
    y = np.clip(y, -6, 6)
    coarse = (np.maximum(y.view(np.int32) & 0x7F800000, 127 << 23) + (22 << 23) + 0x400000).view(np.float32)
    return (y + coarse) - coarse


def test_a_kernel_is_compiled_once_for_each_key_and_then_launched_by_itself():
    from qkit_torchao.kernels.cuda import Kernel

    calls = []

    class Function:
        def __getitem__(self, grid):
            def run(*arguments, num_warps):
                calls.append(("compiled", grid, arguments, num_warps))
                return Compiled(arguments)

            return run

    class Compiled:
        def __init__(self, first):
            self.first = first

        def __getitem__(self, grid):
            return lambda *arguments: calls.append(("launched", grid, self.first, arguments))

    kernel = Kernel(Function())
    for key, programs, argument in (("a", 4, 1), ("a", 5, 2), ("b", 6, 3), ("a", 7, 4)):
        kernel(key, programs, (argument,), warps=2)
    assert calls == [
        ("compiled", (4,), (1,), 2),
        ("launched", (5, 1, 1), (1,), (2,)),
        ("compiled", (6,), (3,), 2),
        ("launched", (7, 1, 1), (1,), (4,)),
    ]
