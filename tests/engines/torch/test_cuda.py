"""What only a CUDA device can show: the kernels' own containers. Operations are compared by `benchmarks/parity.py`."""

import copy

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from torch._dynamo.utils import counters  # noqa: E402

import qkit  # noqa: E402
from qkit.engines.trainer import TrainerOptions  # noqa: E402

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.filterwarnings(
        "ignore:The CUDA Graph is empty:UserWarning"
    ),  # inductor makes its memory pool by one, torch 2.11
]


def linear(dtype=torch.bfloat16, inputs=1536, outputs=520):
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(inputs, outputs)).to("cuda", dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "recipe", ["int4-g64", "int4-g64-minmax", "int3-g32", "int8-row", "mxfp4", "mxfp8-a16", "nvfp4", "fp8"]
)
def test_prepared_and_converted_agree_on_cuda(recipe, dtype):
    model = qkit.prepare(linear(dtype), recipe)
    x = torch.randn(7, 1536, device="cuda", dtype=dtype)
    with torch.no_grad():
        prepared = model(x)
        weight = model[0].weight.clone()
        converted = qkit.convert(model)(x)
        assert torch.equal(
            qkit.backend("torchao").unpack(model[0]).codes, qkit.quantize(weight, model[0].rule.weight).codes
        )
        scale = x.float().abs() @ weight.float().abs().T
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 5e-4, torch.float16: 5e-4}[dtype]  # of abs(x) @ abs(w)
    bound = tolerance * scale + (0 if dtype == torch.float32 else 2**-7 * converted.float().abs())  # each rounds once
    assert ((prepared - converted).float().abs() <= bound).all()


@pytest.mark.parametrize(
    ("recipe", "dtypes"),
    [
        ("int8-dynamic-act-int8-weight", [torch.float32, torch.bfloat16, torch.float16]),
        ("int8-static-act-int8-weight", [torch.float32, torch.bfloat16, torch.float16]),
        ("float8-dynamic-act-float8-weight", [torch.bfloat16]),
        ("float8-static-act-float8-weight", [torch.bfloat16]),
    ],
)
@pytest.mark.parametrize("rows", [1, 7, 16, 17, 300])
def test_codes_of_both_sides_are_multiplied_as_they_are(recipe, dtypes, rows):
    for dtype in dtypes:
        model = qkit.prepare(linear(dtype, outputs=512), recipe).eval()
        x = torch.randn(rows, 1536, device="cuda", dtype=dtype)
        if "static" in recipe:
            with qkit.calibrating(model), torch.no_grad():
                model(x)
        with torch.no_grad():
            prepared = model(x)
            weight, bias = qkit.dequantize(qkit.quantize(model[0].weight, model[0].rule.weight)), model[0].bias.clone()
            model = qkit.convert(model)
            converted = model(x)
        assert "on the codes of both sides" in qkit.coverage(model).rows[0].state
        assert qkit.coverage(model).rows[0].state.startswith("native: ")
        scale = x.double().abs() @ weight.double().abs().T + bias.double().abs()
        tolerance = {torch.float32: 1e-6, torch.bfloat16: 5e-4, torch.float16: 5e-4}[dtype]  # R13, of abs(x) @ abs(w)
        rounding = {torch.float32: 0, torch.bfloat16: 2**-7, torch.float16: 2**-10}[
            dtype
        ]  # each side rounds its output
        bound = tolerance * scale + rounding * converted.double().abs()
        assert ((prepared - converted).double().abs() <= bound).all()


@pytest.mark.parametrize("recipe", ["int8-dynamic-act-int8-weight", "float8-dynamic-act-float8-weight"])
def test_nan_stays_in_its_row_where_codes_are_multiplied(recipe):
    model = qkit.convert(linear(outputs=512), recipe)
    x = torch.randn(20, 1536, device="cuda", dtype=torch.bfloat16)
    want = model(x)
    x[3, 5], x[4, 7] = torch.nan, -torch.inf
    made = model(x)
    assert made[3:5].isnan().all()
    assert torch.equal(made[:3], want[:3])
    assert torch.equal(made[5:], want[5:])


@pytest.mark.parametrize(
    "recipe",
    [
        "int4-g64",
        "int8-dynamic-act-int8-weight",
        "float8-dynamic-act-float8-weight",
        "mxfp4",
        "nvfp4",
        "int4-g64-minmax",
    ],
)
def test_converted_models_compile_on_cuda(recipe):
    model = qkit.convert(linear(outputs=512), recipe)
    x = torch.randn(40, 1536, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        eager = model(x)
        compiled = torch.compile(model, fullgraph=True)(x)
    torch.testing.assert_close(
        compiled, eager, rtol=2**-7, atol=5e-3
    )  # bf16: inductor rounds after the bias, eager before


@pytest.mark.parametrize(("outputs", "dtype"), [(520, torch.bfloat16), (512, torch.float32)])
def test_a_layer_whose_codes_torch_does_not_multiply_runs_on_packed_codes(outputs, dtype):
    model = linear(dtype, outputs=outputs)  # torch._scaled_mm wants multiples of 16, and gives bfloat16
    x = torch.randn(40, 1536, device="cuda", dtype=dtype)
    prepared = qkit.prepare(copy.deepcopy(model), "float8-dynamic-act-float8-weight").eval()
    converted = qkit.convert(model, "float8-dynamic-act-float8-weight")
    assert "packed codes" in qkit.coverage(converted).rows[0].state
    with torch.no_grad():
        torch.testing.assert_close(converted(x), prepared(x), rtol=2**-7, atol=5e-3)  # sums in another order


def test_a_model_that_moves_changes_its_kernel():
    model = qkit.convert(linear(outputs=512), "int4-g64")
    codes = qkit.backend("torchao").unpack(model[0]).codes.cpu()
    states = []
    for device in ("cpu", "cuda"):
        model = model.to(device)
        states.append(qkit.coverage(model).rows[0].state)
        assert torch.equal(qkit.backend("torchao").unpack(model[0]).codes.cpu(), codes)
    assert all(state.startswith("native: ") for state in states)
    assert len(set(states)) == 2


def test_switches_and_ranges_work_in_cuda_graphs():
    model = qkit.prepare(linear(outputs=512), "int8-static-act-int8-weight").eval()
    x = torch.randn(8, 1536, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        with qkit.calibrating(model):
            model(x)
        on = model(x)
        with qkit.disabled(model):
            off = model(x)
        compiled = torch.compile(model, fullgraph=True, mode="reduce-overhead")
        for _ in range(3):
            made = compiled(x).clone()
        torch.testing.assert_close(made, on, rtol=2**-7, atol=5e-3)  # bf16 rounding of the output
        with qkit.disabled(model):
            torch.testing.assert_close(compiled(x).clone(), off, rtol=2**-7, atol=5e-3)  # as above


TRAINED = ["int4-g32", "mxfp4", "nvfp4", "int8-dynamic-act-int4-weight", "int8-dynamic-act-int8-weight", "fp8"]


@pytest.mark.parametrize("autocast", [False, True], ids=["bfloat16", "autocast"])
@pytest.mark.parametrize("recipe", TRAINED)
def test_training_in_inductors_graphs_is_that_of_eager(recipe, autocast):
    dtype = torch.float32 if autocast else torch.bfloat16
    models = [qkit.prepare(linear(dtype, outputs=512), recipe) for _ in range(2)]
    runs = models[0], torch.compile(models[1], fullgraph=True, mode="reduce-overhead")
    skipped = counters["inductor"]["cudagraph_skips"]
    x = torch.randn(32, 1536, device="cuda", dtype=dtype)
    for model, run in zip(models, runs, strict=True):
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        for step in range(6):
            (qkit.disable if step == 4 else qkit.enable)(model)
            torch.compiler.cudagraph_mark_step_begin()
            with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
                y = run(x)
            y.float().square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert counters["inductor"]["cudagraph_skips"] == skipped
    torch.testing.assert_close(models[0][0].weight, models[1][0].weight, rtol=2**-6, atol=1e-5)  # sums in another order


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("recipe", ["int4-g32", "nvfp4", "int8-dynamic-act-int4-weight"])
def test_a_model_on_another_device_than_the_current_one_trains_as_on_the_cpu(recipe):
    models = [qkit.prepare(torch.nn.Sequential(torch.nn.Linear(64, 64)), recipe) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    models[1].to("cuda:1")
    x = torch.randn(4, 64)
    for model in models:
        optimizer = qkit.adamw(model, lr=1e-3)
        for _ in range(3):
            model(x.to(model[0].weight.device)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert torch.cuda.current_device() == 0
    torch.testing.assert_close(models[0][0].weight, models[1][0].weight.cpu(), rtol=1e-3, atol=1e-5)  # sums' order


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_resumed_trainer_draws_on_the_random_numbers_of_its_own_device():
    """The model is on the second GPU, and the process has the first for its current one."""
    engine = qkit.backend("torchao").on("cuda:1")

    def trainer():
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Embedding(32, 64), torch.nn.Dropout(0.5), torch.nn.Linear(64, 32))
        return engine.trainer(qkit.prepare(model.to("cuda:1"), "int4-g32"), TrainerOptions(weight_decay=0.0, seed=3))

    tokens = [torch.arange(18).reshape(2, 9).numpy().astype("int32") % 32]
    whole = trainer()
    losses = [whole.step(tokens, learning_rate=1e-2) for _ in range(4)]
    first = trainer()
    for _ in range(2):
        first.step(tokens, learning_rate=1e-2)
    state = {name: array.copy() for name, array in first.state().items()}
    torch.randn(100, device="cuda:0")
    second = trainer()
    torch.randn(100, device="cuda:1")
    second.restore(state)
    assert [second.step(tokens, learning_rate=1e-2) for _ in range(2)] == losses[2:]
    assert len(set(losses)) == 4
