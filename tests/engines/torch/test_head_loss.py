"""The loss over an output head in chunks of rows: it is transformers' loss, and no tensor has the logits of all tokens."""

import copy

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from qkit_torchao import chunk_loss  # noqa: E402
from qkit_torchao.training import head_loss  # noqa: E402

import qkit  # noqa: E402

VOCABULARY, WIDTH, ROWS, TOKENS = 160, 32, 7, 2 * 24
SHAPE = {
    "vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16,
}  # fmt: skip
FAMILIES = {
    "llama": ("Llama", {}),
    "tied": ("Llama", {"tie_word_embeddings": True}),
    "gemma": ("Gemma2", {"final_logit_softcapping": 5.0}),
    "granite": ("Granite", {"logits_scaling": 3.0}),
    "cohere": ("Cohere", {"logit_scale": 0.25}),
    "mixtral": ("Mixtral", {"num_local_experts": 2, "output_router_logits": True, "router_aux_loss_coef": 0.5}),
}


@pytest.fixture(autouse=True)
def _few_rows(monkeypatch):
    monkeypatch.setattr(head_loss, "LOGITS", ROWS * VOCABULARY)


def build(family="llama", **more):
    name, settings = FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**SHAPE, "tie_word_embeddings": False, **settings, **more})
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    with torch.no_grad():
        for one in model.parameters():
            one.mul_(4)  # logits that are far from even
    return model.train()


def rows():
    ids = torch.randint(0, VOCABULARY, (2, TOKENS // 2), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[0, :5] = -100
    return {"input_ids": ids, "labels": labels}


def gradients(model):
    return {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}


def widest(model, act):
    """The most logits that one tensor has which autograd stores, or the head returns."""
    seen = [0]

    def note(tensor):
        seen.append(
            tensor.numel() if tensor.shape[-1:] == (VOCABULARY,) and tensor.shape[0] != WIDTH else 0
        )  # no weight
        return tensor

    hook = model.get_output_embeddings().register_forward_hook(
        lambda module, arguments, out: seen.append(out.numel() if out.shape[-1] == VOCABULARY else 0)
    )
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        act()
    hook.remove()
    return max(seen)


WAYS = {
    "float": lambda model: model,
    "prepared": lambda model: qkit.prepare(model, "int4-g32-all"),
    "quantized inputs": lambda model: qkit.prepare(model, "int8-dynamic-act-int8-weight"),
    "adapted": lambda model: qkit.adapt(qkit.prepare(model, "int4-g32-all"), qkit.Adapter(rank=2)),
    "packed": lambda model: qkit.adapt(qkit.convert(model, "int4-g32-all"), qkit.Adapter(rank=2)),
}


@pytest.mark.parametrize("count", [None, 11])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_those_of_transformers(family, count):
    more = {} if count is None else {"num_items_in_batch": count}
    plain, model = build(family), chunk_loss(build(family))
    want = plain(**rows(), **more)
    found = model(**rows(), **more)
    assert found.logits is None
    assert float(found.loss.detach()) == pytest.approx(float(want.loss.detach()), rel=1e-6)  # of sums in another order
    want.loss.backward()
    found.loss.backward()
    mine, theirs = gradients(model), gradients(plain)
    assert mine.keys() == theirs.keys()
    for name, one in mine.items():
        torch.testing.assert_close(one, theirs[name], rtol=1e-3, atol=1e-6)  # as above, through layers


@pytest.mark.parametrize("way", WAYS)
def test_a_head_on_a_grid_or_with_an_adapter_has_its_own_loss_and_gradients(way):
    plain, model = WAYS[way](build()).train(), chunk_loss(WAYS[way](build())).train()
    want, found = plain(**rows()).loss, model(**rows()).loss
    assert float(found.detach()) == pytest.approx(float(want.detach()), rel=1e-6)  # of sums in another order
    want.backward()
    found.backward()
    mine, theirs = gradients(model), gradients(plain)
    assert mine.keys() == theirs.keys()
    for name, one in mine.items():
        torch.testing.assert_close(one, theirs[name], rtol=1e-3, atol=1e-5)  # as above, through layers


def test_no_tensor_has_the_logits_of_all_tokens():
    plain, model = build(), chunk_loss(build())
    assert widest(plain, lambda: plain(**rows()).loss.backward()) >= TOKENS * VOCABULARY
    assert 0 < widest(model, lambda: model(**rows()).loss.backward()) <= ROWS * VOCABULARY


def test_a_frozen_head_gets_no_gradient():
    model = chunk_loss(build())
    model.lm_head.weight.requires_grad_(False)
    model(**rows()).loss.backward()
    assert model.lm_head.weight.grad is None
    assert model.model.norm.weight.grad is not None


def test_products_in_bfloat16_lose_no_more_than_in_one_piece():
    plain, model = build(), chunk_loss(build())
    with torch.autocast("cpu", torch.bfloat16):
        want, found = plain(**rows()).loss, model(**rows()).loss
    assert float(found.detach()) == pytest.approx(float(want.detach()), rel=1e-6)  # of sums in another order
    want.backward()
    found.backward()
    torch.testing.assert_close(model.lm_head.weight.grad, plain.lm_head.weight.grad, rtol=0.05, atol=1e-3)  # 8 bits


def test_evaluation_and_a_copy_are_as_before():
    model = chunk_loss(build())
    twin = copy.deepcopy(model)
    torch.testing.assert_close(twin(**rows()).loss, model(**rows()).loss, rtol=0, atol=0)
    out = model.eval()(**rows())
    assert out.logits.shape == (2, TOKENS // 2, VOCABULARY)
    assert torch.equal(out.loss, build().eval()(**rows()).loss)


def test_a_forward_that_fails_gives_the_head_back():
    model = chunk_loss(build())
    with pytest.raises(TypeError):
        model(**rows(), nonsense=1, position_ids="none")
    assert "forward" not in model.lm_head.__dict__
    assert model(input_ids=rows()["input_ids"]).logits.shape[-1] == VOCABULARY


def test_qkits_trainer_computes_its_loss_in_chunks(monkeypatch):
    engine, tokens = qkit.backend("torchao"), rows()["input_ids"].numpy().astype("int32")
    losses = []
    for size in (10**9, ROWS * VOCABULARY):
        monkeypatch.setattr(head_loss, "LOGITS", size)
        model = qkit.prepare(build(), "int4-g32")
        trainer = engine.trainer(model, qkit.engines.trainer.TrainerOptions(weight_decay=0.0, seed=0))
        found = [trainer.step([tokens], learning_rate=1e-3) for _ in range(2)]
        losses.append([*found, engine.loss(model, tokens)])
        assert (widest(model, lambda: engine.loss(model, tokens)) <= ROWS * VOCABULARY) == (size < 10**9)  # noqa: B023
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)  # of sums in another order, over three steps


def test_a_model_that_changes_its_logits_in_another_way_is_refused_and_qkits_trainer_computes_all():
    model = build()
    forward = model.forward

    def squared(*arguments, **named):
        out = forward(*arguments, **named)
        out.logits = out.logits**2
        return out

    model.forward = squared
    ids = rows()["input_ids"]
    aims = torch.roll(ids, -1, 1)
    want = torch.nn.functional.cross_entropy(model(ids).logits.flatten(0, 1), aims.flatten(), reduction="sum")
    assert torch.equal(head_loss.sum_of_nats(model, ids, aims), want)
    with pytest.raises(
        qkit.StageError, match="LlamaForCausalLM in chunks: it changes its logits in a way that is not known"
    ):
        chunk_loss(model)(**rows())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: torch.nn.Linear(2, 2), "Linear in chunks: it has no output head"),
        (lambda: qkit.prepare(build(), static()), "quantized on ranges of all tokens together"),
    ],
)
def test_a_head_that_needs_all_tokens_is_refused_by_name(make, message):
    with pytest.raises(qkit.StageError, match=message):
        chunk_loss(make())


def static():
    return qkit.Recipe(
        "static",
        (qkit.Rule(("lm_head",), weight=qkit.Grid("int8", "row"), activation=qkit.Grid("int8", "tensor")),),
    )
