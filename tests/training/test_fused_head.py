"""TRL's trainers read the weight of the output head, and never call it: they read the values that the head computes with."""

import copy

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
utils = pytest.importorskip("trl.trainer.utils")
if not hasattr(utils, "add_fused_lm_head"):
    pytest.skip("this TRL calls the head", allow_module_level=True)

import qkit  # noqa: E402
from qkit.errors import StageError  # noqa: E402

IDS = torch.arange(24).reshape(2, 12) * 5 % 64


def llama(*, tied=False):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, tie_word_embeddings=tied,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).train()


def prepared():
    return qkit.prepare(llama(), "int4-g32-all")


def tied():
    return qkit.prepare(llama(tied=True), "int4-g32-all")


def converted():
    return qkit.convert(llama(), "int4-g32-all")


def adapted(base):
    def build():
        model = qkit.adapt(base(), qkit.Adapter(rank=2, match=("*",)))
        for name, one in model.named_parameters():
            if name.endswith("lora_B"):
                torch.nn.init.normal_(one, std=0.2)
        return model

    return build


def both(model):
    """The loss of the model and that of TRL's forward, each with gradients."""
    found = []
    for fused in (False, True):
        one = copy.deepcopy(model)
        if fused:
            utils.add_fused_lm_head(one)
            loss = one(input_ids=IDS, labels=IDS, fused_lm_head=True).loss
        else:
            loss = one(input_ids=IDS, labels=IDS).loss
        if loss.requires_grad:
            loss.backward()
        found.append((loss.detach(), {name: x.grad for name, x in one.named_parameters() if x.grad is not None}))
    return found


@pytest.mark.parametrize(
    "build",
    [prepared, tied, converted, adapted(prepared), adapted(converted)],
    ids=["prepared", "tied", "converted", "adapted prepared", "adapted converted"],
)
def test_the_loss_is_that_of_the_model(build):
    (want, gradients), (loss, found) = both(build())
    torch.testing.assert_close(loss, want, rtol=1e-6, atol=0)  # sums in another order
    assert found.keys() == gradients.keys()
    for name, one in gradients.items():
        torch.testing.assert_close(found[name], one, rtol=1e-4, atol=1e-5)  # float32, summed by chunks


def test_the_head_is_itself_again_after_the_forward_also_after_a_failure():
    model = prepared()
    utils.add_fused_lm_head(model)
    model(input_ids=IDS, labels=IDS, fused_lm_head=True)
    assert model.get_output_embeddings() is model.lm_head
    with pytest.raises(IndexError):
        model(input_ids=IDS + 1000, labels=IDS, fused_lm_head=True)
    assert model.get_output_embeddings() is model.lm_head


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft asks for it
def test_a_head_under_peft_is_seen_by_the_callback():
    peft = pytest.importorskip("peft")
    from qkit_torchao import QatCallback

    model = peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    callback = QatCallback("int4-g32-all")
    callback.on_init_end(None, None, None, model=model)
    want = model(input_ids=IDS, labels=IDS).loss
    utils.add_fused_lm_head(model.get_base_model())
    torch.testing.assert_close(
        model(input_ids=IDS, labels=IDS, fused_lm_head=True).loss, want, rtol=1e-6, atol=0
    )  # sums in another order


BOTH = """
schema = 1
grids.w = {element = "int8", group = "row", scale = "absmax"}
[[rules]]
match = "*"
weight = "w"
activation = "w"
"""


def test_a_head_that_quantizes_its_input_is_refused(tmp_path):
    (tmp_path / "both.toml").write_text(BOTH)
    model = qkit.prepare(llama(), tmp_path / "both.toml")
    utils.add_fused_lm_head(model)
    with pytest.raises(StageError, match="reads the weight of the output head"):
        model(input_ids=IDS, labels=IDS, fused_lm_head=True)
