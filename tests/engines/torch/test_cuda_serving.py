"""Converted layers on a CUDA device: every recipe by kernels on packed codes, wherever models go."""

import copy

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from qkit_torchao.kernels import choose  # noqa: E402
from qkit_torchao.layers import execution  # noqa: E402
from served import WITHIN, serve  # noqa: E402

import qkit  # noqa: E402

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.filterwarnings("ignore:The CUDA Graph is empty:UserWarning"),  # see test_cuda.py
]
ENGINE = qkit.backend("torchao")
PACKED = [f"int{bits}-g64" for bits in (2, 3, 4, 5, 6, 8)]
PACKED += ["int4-g64-minmax", "int8-row", "mxfp4-a16", "nvfp4-a16", "mxfp8-a16", "fp8"]


def state(model):
    """How its first layer runs."""
    return qkit.coverage(model).rows[0].state


def linear(dtype=torch.bfloat16, inputs=1536, outputs=520):
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(inputs, outputs)).to("cuda", dtype)


@pytest.mark.parametrize("recipe", qkit.recipes())
def test_every_recipe_runs_natively_and_agrees_with_its_prepared_layer(recipe):
    runs, far = serve(recipe, "cuda", rows=(1, 3, 16, 300))
    assert runs.startswith("native: ")
    assert far <= WITHIN


@pytest.mark.parametrize("recipe", PACKED)
def test_exact_gives_the_bits_of_the_prepared_layer(recipe):
    prepared = qkit.prepare(linear(outputs=512), recipe).eval()
    converted = qkit.convert(copy.deepcopy(prepared))
    for rows in (1, 40):
        x = torch.randn(rows, 1536, device="cuda", dtype=torch.bfloat16)
        with torch.no_grad(), qkit.exact():
            assert torch.equal(converted(x), prepared(x))


@pytest.mark.parametrize("recipe", PACKED)
def test_packed_codes_are_those_of_quantize_wherever_they_go(recipe, tmp_path):
    model = linear(outputs=512)
    want = qkit.quantize(model[0].weight.detach(), qkit.recipe(recipe).rules[-1].weight)
    x = torch.randn(3, 1536, device="cuda", dtype=torch.bfloat16)
    model = qkit.convert(model, recipe)
    y = model(x)
    stored = sum(array.nbytes for array in model[0].parts() if array is not None)
    assert stored * 8 <= 1.03 * want.grid.bits_per_weight((512, 1536)) * 512 * 1536
    qkit.save(model, tmp_path / "saved")
    loaded = qkit.load(tmp_path / "saved", into=linear(outputs=512))
    for one in (model, copy.deepcopy(model), loaded, model.to("cpu"), model.to("cuda")):
        held = ENGINE.unpack(one[0]).parts()
        assert all(torch.equal(held[name].cpu(), part.cpu()) for name, part in want.parts().items())
        if one[0].execution.layout == "words":
            assert torch.equal(one(x), y)
    half = model.half()
    assert half[0].weight.dtype == torch.float16
    assert torch.equal(ENGINE.unpack(half[0]).codes, want.codes)


@pytest.mark.parametrize("recipe", ["int4-g32", "int3-g64", "mxfp4", "nvfp4-a16", "int8-dynamic-act-int8-weight"])
def test_converted_layers_run_in_cuda_graphs_and_compiled(recipe):
    model = qkit.convert(linear(outputs=512), recipe)
    for rows in (1, 40):
        x = torch.randn(rows, 1536, device="cuda", dtype=torch.bfloat16)
        with torch.no_grad():
            want = model(x)
            compiled = torch.compile(model, fullgraph=True, mode="reduce-overhead")
            for _ in range(3):
                made = compiled(x).clone()
            torch.testing.assert_close(made, want, rtol=2**-7, atol=5e-3)  # bf16: one more rounding
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                y = model(x)
            x.copy_(torch.randn_like(x))
            graph.replay()
            assert torch.equal(y, model(x))


@pytest.mark.parametrize("recipe", ["int4-g32-all", "int8-dynamic-act-int4-weight", "fp8"])
def test_a_converted_llama_generates(recipe):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlamaConfig(vocab_size=512, num_key_value_heads=2, **sizes)
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).to("cuda", torch.bfloat16)
    model = qkit.convert(model, recipe)
    tokens = torch.arange(12, device="cuda")[None]
    made = model.generate(tokens, max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert made.shape == (1, 20)


@pytest.mark.parametrize(("group", "inputs"), [(24, 1536), (43, 1505)])
def test_groups_that_no_product_takes_are_decoded_in_one_pass(group, inputs):
    model = linear(inputs=inputs, outputs=512)
    grid = qkit.Grid("int4", group)
    values = qkit.fake_quantize(model[0].weight.detach(), grid)
    model = qkit.convert(model, qkit.Recipe("one", (qkit.Rule(match=("*",), weight=grid),)))
    assert state(model).startswith("decoded first: by one pass of a Triton kernel")
    x = torch.randn(1, inputs, device="cuda", dtype=torch.bfloat16)
    assert torch.equal(model(x), torch.nn.functional.linear(x, values, model[0].bias))


def test_without_triton_the_way_out_is_named(monkeypatch):
    monkeypatch.setattr(choose, "find_spec", lambda name: None)
    choose.why_no_triton.cache_clear()
    execution.choose_execution.cache_clear()
    try:
        assert "pip install 'qkit-quant[cuda]'" in state(qkit.convert(linear(), "int3-g64"))
    finally:
        choose.why_no_triton.cache_clear()
        execution.choose_execution.cache_clear()
