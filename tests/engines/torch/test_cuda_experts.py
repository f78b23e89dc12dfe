"""Converted experts on a GPU: products by codes and by decoded experts, without a copy of all experts."""

import copy
from functools import partial

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from mixtures import IMPLEMENTATIONS, MODELS, make  # noqa: E402

import qkit  # noqa: E402

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
RECIPES = ("int4-g32", "int3-g32", "int4-g32-minmax", "mxfp4-a16", "nvfp4-a16", "fp8")
#: bfloat16: products and sums of 8 significant bits in another order.
NEAR = {"rtol": 4e-2, "atol": 4e-2}


def pair(name, recipe, implementation):
    """The model with the codes' values, and the converted one, in bfloat16 on the GPU."""
    prepared = qkit.prepare(make(name, implementation, dtype="bfloat16").cuda(), recipe)
    return prepared, qkit.convert(copy.deepcopy(prepared))


@pytest.mark.parametrize("tokens", [1, 3, 40])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", MODELS)
def test_converted_experts_compute_what_prepared_ones_do(name, recipe, implementation, tokens):
    prepared, converted = pair(name, recipe, implementation)
    engine, calls = qkit.backend("torchao"), []
    blocks = [[one.module for one in engine.layers(model) if one.kind == "experts"] for model in (prepared, converted)]
    assert blocks[0]
    for block, other in zip(*blocks, strict=True):  # of equal inputs: a router may choose otherwise for near ones
        block.register_forward_hook(partial(lambda other, _, args, out: calls.append((other, args, out)), other))
    with torch.no_grad():
        prepared(torch.arange(tokens, device="cuda")[None] % 128)
        assert len(calls) == len(blocks[0])
        for other, args, out in calls:
            torch.testing.assert_close(other(*args), out, **NEAR)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning")
def test_a_token_waits_for_no_host_under_grouped_products():
    _, converted = pair("qwen3_moe", "int4-g32", "grouped_mm")
    layer = next(one.module for one in qkit.backend("torchao").layers(converted) if one.kind == "experts")
    assert layer.execution.layout == "words"
    x = torch.randn(1, 64, device="cuda", dtype=torch.bfloat16)
    chosen, weights = (
        torch.tensor([[0, 2]], device="cuda"),
        torch.full((1, 2), 0.5, device="cuda", dtype=torch.bfloat16),
    )
    with torch.no_grad():
        layer(x, chosen, weights)  # compiles
        torch.cuda.set_sync_debug_mode("error")
        try:
            layer(x, chosen, weights)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_training_beside_frozen_experts_keeps_no_decoded_expert():
    sizes = {"hidden_size": 512, "moe_intermediate_size": 512, "num_experts": 32, "num_hidden_layers": 1}
    config = transformers.Qwen3MoeConfig(
        vocab_size=64,
        num_attention_heads=4,
        num_key_value_heads=4,
        intermediate_size=512,
        num_experts_per_tok=4,
        **sizes,
    )
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).cuda()
    model = qkit.convert(model, "int4-g32")
    model = qkit.adapt(model, qkit.Adapter(rank=4, match=("*.q_proj",)))
    ids = torch.arange(256, device="cuda")[None] % 64
    model(ids, labels=ids).loss.backward()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    model(ids, labels=ids).loss.backward()
    all_experts = 32 * 3 * 512 * 512 * 2
    assert torch.cuda.max_memory_allocated() - before < all_experts / 2
