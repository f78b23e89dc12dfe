"""Mixtures of experts on torch: prepared, trained, converted, saved and loaded, by transformers' own classes."""

import copy
import json
import pickle

import numpy as np
import pytest

import qkit
from qkit import reference
from qkit.experts import is_router
from qkit.qtensor import QTensor

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from mixtures import IMPLEMENTATIONS, MODELS, OTHERS, make  # noqa: E402

IDS = torch.arange(24).view(2, 12)
ENGINE = qkit.backend("torchao")


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def blocks(model):
    return {layer.path: layer for layer in ENGINE.layers(model) if layer.kind == "experts"}


def master(layer, stack):
    return dict(layer.module.named_parameters(recurse=False))[stack.name]


def of_the_law(weight, grid):
    """The codes of an expert's matrices by NumPy, gate and up on one tensor scale where the grid has one."""
    matrices = {name: ENGINE.to_numpy(one) for name, one in weight.items()}
    peak = max(float(np.abs(matrices[name].astype(np.float32)).max()) for name in ("gate_proj", "up_proj"))
    shared = {"peak": peak} if grid.scale == "nvfp4" else {}
    return {
        name: reference.quantize(np.ascontiguousarray(one), grid, **({} if name == "down_proj" else shared))
        for name, one in matrices.items()
    }


#: Groups of 16 codes of 3 bits are parts of words, which no kernel takes.
SHORT = qkit.Recipe("short", (qkit.Rule(match=("*",), kind="experts", weight=qkit.Grid("int3", 16)),))


@pytest.mark.parametrize(
    "recipe", ["int4-g32", "int3-g32", "int4-g32-minmax", "mxfp4-a16", "nvfp4-a16", "fp8", SHORT], ids=str
)
@pytest.mark.parametrize("name", MODELS)
def test_codes_of_experts_are_the_laws(name, recipe):
    model = make(name)
    weights = {path: ENGINE.experts(layer.module) for path, layer in blocks(model).items()}
    weights = {path: {key: one.clone() for key, one in mine.items()} for path, mine in weights.items()}
    model = qkit.convert(model, recipe)
    assert weights
    for path, layer in blocks(model).items():
        found = ENGINE.unpack_experts(layer.module)
        for expert in range(layer.shape[0]):
            want = of_the_law({key: one[expert] for key, one in weights[path].items()}, layer.rule.weight)
            for key, q in want.items():
                assert_equal(found[key][expert], q)


def assert_equal(found: QTensor, wanted: QTensor):
    for name, part in wanted.parts().items():
        assert np.array_equal(ENGINE.to_numpy(found.parts()[name]), part), name


@pytest.mark.parametrize(
    "grid", ["int4-g32-affine", "int3-g32-affine", "int4-g32-stored-zeros", "e2m1-g32-stored-e8m0"]
)
def test_experts_on_read_grids_lie_without_gaps_and_decode_to_the_law(grid):
    model, grid = make(next(iter(MODELS))), qkit.Grid.parse(grid)
    drawn = np.random.default_rng(0)
    for layer in blocks(model).values():
        found, want = {}, {}
        for name, stacked in ENGINE.experts(layer.module).items():
            qs = [as_read(grid, tuple(one.shape), drawn) for one in stacked]
            found[name], want[name] = [q.map(ENGINE.from_numpy) for q in qs], qs
        packed = ENGINE.pack_experts(layer.module, found, qkit.Rule(("*",), kind="experts", weight=grid))
        assert packed.in_words
        codes = sum(packed.stored(name)["codes"].nbytes for name in want)
        assert codes * 8 == grid.element.bits * sum(q.codes.size for qs in want.values() for q in qs)
        for stack in packed.stacks:
            for expert in range(stack.shape[0]):
                values = [torch.from_numpy(reference.dequantize(want[name][expert])) for name in stack.projections]
                assert torch.equal(packed.decoded(stack, expert).float(), stack.join(iter(values)))
        for name, qs in ENGINE.unpack_experts(packed).items():
            for one, q in zip(qs, want[name], strict=True):
                assert_equal(one, q)


def as_read(grid, shape, drawn):
    """Random codes and scales on a read grid."""
    groups = grid.scale_shape(shape)
    floats = drawn.uniform(0.01, 0.02, groups).astype(np.float16)
    scales = drawn.integers(118, 124, groups).astype(np.uint8) if grid.stored_scales == "e8m0" else floats
    codes = drawn.integers(0, grid.element.levels + 1, shape).astype(np.uint8)
    zeros = drawn.integers(0, grid.element.levels + 1, groups).astype(np.uint8) if grid.has_zeros else None
    biases = drawn.uniform(-0.1, 0, groups).astype(np.float16) if grid.has_biases else None
    return QTensor(codes, scales, grid, "float32", zeros=zeros, biases=biases)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", MODELS)
def test_prepared_converted_saved_and_loaded_models_compute_the_same(name, implementation, tmp_path):
    model = qkit.prepare(make(name, implementation), "int4-g32")
    prepared = logits(model)
    plain = make(name, implementation)  # with the values in place of the weights
    with torch.no_grad():
        values = {layer.path: layer.module for layer in blocks(model).values()}
        for path, layer in blocks(plain).items():
            for stack in values[path].stacks:
                master(layer, stack).copy_(getattr(values[path], stack.name))
    rules = tuple(rule for rule in qkit.recipe("int4-g32").rules if rule.kind != "experts")
    plain = qkit.prepare(plain, qkit.Recipe("without experts", rules))
    assert torch.equal(logits(plain), prepared)
    model = qkit.convert(model)
    assert torch.equal(logits(model), prepared)
    qkit.save(model, tmp_path / "out")
    loaded = qkit.load(tmp_path / "out", backend="torchao")
    loaded.set_experts_implementation(implementation)
    assert torch.equal(logits(loaded), prepared)


@pytest.mark.parametrize("name", OTHERS)
def test_other_families_too(name, tmp_path):
    model = qkit.prepare(make(name), "int4-g32")
    assert blocks(model)
    prepared = logits(model)
    qkit.save(model := qkit.convert(model), tmp_path / "out")
    assert torch.equal(logits(model), prepared)
    loaded = qkit.load(tmp_path / "out", backend="torchao")
    loaded.set_experts_implementation("eager")
    assert torch.equal(logits(loaded), prepared)


@pytest.mark.parametrize("name", [*MODELS, *OTHERS])
def test_routers_are_never_quantized(name):
    recipe = qkit.Recipe(
        "all", tuple(qkit.Rule(("*",), kind, qkit.Grid("int8", "row")) for kind in ("linear", "experts"))
    )
    model = qkit.convert(make(name), recipe)
    routers = [layer for layer in ENGINE.layers(model) if is_router(layer.path.removesuffix(".weight"))]
    assert routers
    assert {layer.kind for layer in routers} == {"other"}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", MODELS)
def test_the_gradient_of_experts_passes_straight_through(name, implementation):
    model, plain = qkit.prepare(make(name, implementation), "int4-g32"), make(name, implementation)
    qkit.prepare(plain, qkit.Recipe("r", tuple(r for r in qkit.recipe("int4-g32").rules if r.kind != "experts")))
    with torch.no_grad():
        for path, layer in blocks(plain).items():
            module = blocks(model)[path].module
            for stack in module.stacks:
                master(layer, stack).copy_(getattr(module, stack.name))
    for one in (model, plain):
        one(IDS, labels=IDS).loss.backward()
    found, wanted = dict(model.named_parameters()), dict(plain.named_parameters())
    assert found.keys() == wanted.keys()
    for path, layer in blocks(model).items():
        for parameter in layer.stored:
            assert path in parameter
            assert torch.equal(found[parameter].grad, wanted[parameter].grad)


def test_values_are_cached_until_a_parameter_changes(monkeypatch):
    from qkit_torchao.layers.stacks import Stack

    model = qkit.prepare(make("mixtral"), "int4-g32").train()
    calls = []
    original = Stack.values
    monkeypatch.setattr(Stack, "values", lambda self, w, grid: calls.append(self.name) or original(self, w, grid))
    model(IDS, labels=IDS).loss.backward()
    model(IDS, labels=IDS).loss.backward()
    assert len(calls) == 4  # two parameters of each of two blocks
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    model(IDS)
    assert len(calls) == 8


@pytest.mark.parametrize("name", MODELS)
def test_training_ends_in_the_codes_of_the_last_step(name):
    model = qkit.prepare(make(name, "grouped_mm"), "int4-g32").train()
    model.activation_checkpointing_enable()
    optimizer = qkit.adamw(model, lr=1e-2)
    losses = []
    for _ in range(4):
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    model.eval()
    trained = logits(model)
    masters = {path: {k: w.clone() for k, w in ENGINE.experts(b.module).items()} for path, b in blocks(model).items()}
    model = qkit.convert(model)
    assert torch.equal(logits(model), trained)
    for path, layer in blocks(model).items():
        found = ENGINE.unpack_experts(layer.module)
        for key, q in of_the_law({k: w[1] for k, w in masters[path].items()}, layer.rule.weight).items():
            assert_equal(found[key][1], q)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("recipe", ["int8-dynamic-act-int4-weight", "mxfp8", "int8-dynamic-act-int8-weight"])
def test_inputs_of_experts_are_quantized_in_training_and_after(recipe, implementation, tmp_path):
    model = qkit.prepare(make("mixtral", implementation), recipe)
    prepared = logits(model)
    weights_only = qkit.prepare(make("mixtral", implementation), recipe)
    for layer in blocks(weights_only).values():
        layer.module.rule = qkit.Rule(("*",), "experts", layer.rule.weight)
    assert not torch.equal(logits(weights_only), prepared)
    model = qkit.convert(model)
    assert torch.equal(logits(model), prepared)
    qkit.save(model, tmp_path / "out")
    loaded = qkit.load(tmp_path / "out", backend="torchao")
    loaded.set_experts_implementation(implementation)
    assert torch.equal(logits(loaded), prepared)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_static_ranges_are_of_each_expert_and_name_those_that_no_token_reached(name, tmp_path):
    few = IDS[:1, :1]  # two experts of four
    model = qkit.prepare(make(name), "int8-static-act-int8-weight")
    with qkit.calibrating(model), torch.no_grad():
        model(few)
    with pytest.raises(qkit.StageError, match=r"mlp\.experts: no token reached \d of its 4 experts .*all_experts=True"):
        qkit.convert(model)
    with qkit.calibrating(model), torch.no_grad():
        wanted = model(few).logits
    with qkit.calibrating(model, all_experts=True), torch.no_grad():
        assert torch.allclose(model(few).logits, wanted, atol=1e-5)  # the shape of a product orders its sums
        model(IDS)
    prepared = logits(model)
    seen = [layer.module.get_buffer("down_input_range") for layer in blocks(model).values()]
    assert all(len({tuple(one) for one in each.tolist()}) == 4 for each in seen)
    model = qkit.convert(model)
    assert torch.equal(logits(model), prepared)
    qkit.save(model, tmp_path / "out")
    loaded = qkit.load(tmp_path / "out", backend="torchao")
    loaded.set_experts_implementation("eager")
    assert torch.equal(logits(loaded), prepared)


def test_a_masked_gradient_is_zero_where_a_weight_was_clipped():
    grid = qkit.Grid("int4", 32)
    recipe = qkit.Recipe("masked", (qkit.Rule(("*",), "experts", grid, ste="masked"),))
    model = qkit.prepare(make("gpt_oss"), recipe)
    model(IDS, labels=IDS).loss.backward()
    for layer in blocks(model).values():
        for stack in layer.module.stacks:
            w = master(layer, stack)
            rows = w.detach().transpose(-1, -2).contiguous()
            outside = ~torch.from_numpy(reference.unclipped(rows.numpy(), grid)).transpose(-1, -2)
            assert outside.any()
            assert (w.grad[outside] == 0).all()


def test_a_switched_off_model_is_the_float_one_and_a_copy_computes_the_same():
    model = qkit.prepare(make("mixtral"), "int4-g32")
    prepared = logits(model)
    with qkit.disabled(model):
        assert torch.equal(logits(model), logits(make("mixtral")))
    assert torch.equal(logits(copy.deepcopy(model)), prepared)
    assert torch.equal(logits(pickle.loads(pickle.dumps(model))), prepared)
    model = qkit.convert(model)
    assert torch.equal(logits(copy.deepcopy(model)), prepared)
    assert torch.equal(logits(pickle.loads(pickle.dumps(model))), prepared)


@pytest.mark.parametrize("recipe", ["int2-g32", "int3-g32", "int4-g32", "mxfp4-a16", "int8-row", "nvfp4-a16"])
def test_converted_experts_hold_as_many_bits_as_the_plan_says(recipe, tmp_path):
    from qkit.streaming.plan import make_plan

    model = make("mixtral", dtype="bfloat16")
    model.save_pretrained(tmp_path / "in")
    plan = make_plan(tmp_path / "in", qkit.recipe(recipe))
    model = qkit.convert(model, recipe)
    rows = {row.path: row for row in qkit.coverage(model).rows}
    for path, layer in blocks(model).items():
        mine = [row for row in plan.rows if row.path == path.replace("mlp", "block_sparse_moe")]
        numbers = np.prod(layer.shape)
        planned = 8 * sum(slot.nbytes for row in mine for slot in row.slots) / numbers
        assert rows[path].bits == planned
        held = sum(b.nbytes for name, b in layer.module.named_buffers() if "codes" in name)
        assert 8 * held / numbers == layer.rule.weight.element.bits
    qkit.save(model, tmp_path / "out")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_no_use_decodes_more_than_one_expert_at_a_time(implementation, monkeypatch):
    from qkit_torchao.layers.packed_experts import Decoded

    model = qkit.convert(make("mixtral", implementation), "int4-g32")
    monkeypatch.setattr(Decoded, "whole", lambda self: pytest.fail("all experts were decoded at once"))
    logits(model)


def test_converted_experts_follow_casts_and_keep_their_codes():
    model = qkit.convert(make("mixtral"), "int4-g32")
    before = [q for layer in blocks(model).values() for q in ENGINE.unpack_experts(layer.module)["down_proj"]]
    model = model.to(torch.bfloat16)
    after = [q for layer in blocks(model).values() for q in ENGINE.unpack_experts(layer.module)["down_proj"]]
    assert logits(model).dtype == torch.bfloat16
    for one, other in zip(before, after, strict=True):
        assert other.dtype == "bfloat16"
        assert torch.equal(one.codes, other.codes)
        assert torch.equal(one.scales, other.scales)


def test_adapters_train_beside_experts_and_merge(tmp_path):
    model = qkit.adapt(qkit.prepare(make("qwen3_moe"), "int4-g32"), qkit.Adapter(rank=2, match=("*.self_attn.*",)))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):
        model(IDS, labels=IDS).loss.backward()
        optimizer.step()
    trained = logits(model)
    model = qkit.convert(qkit.merge(model))
    assert torch.equal(logits(model), trained)
    qkit.save(model, tmp_path / "out")
    loaded = qkit.load(tmp_path / "out", backend="torchao")
    loaded.set_experts_implementation("eager")
    assert torch.equal(logits(loaded), trained)


def with_peft(model, *names, r=2):
    """`model` with peft's LoRA on these parameters of experts, far from zero."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    made = peft.get_peft_model(model, peft.LoraConfig(r=r, target_modules=[], target_parameters=list(names)))
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    return made


STACKED = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")


@pytest.mark.filterwarnings("ignore:.*will be removed in v6:FutureWarning")  # peft's call
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "deepseek_v3"])
def test_pefts_target_parameters_train_on_the_grid_and_merge(name, order, implementation):
    if order == "after":
        model = qkit.prepare(with_peft(make(name, implementation), *STACKED), "int4-g32")
    else:
        model = with_peft(qkit.prepare(make(name, implementation), "int4-g32"), *STACKED)
    found = blocks(model)
    assert {layer.stage for layer in found.values()} == {"prepared"}
    model(IDS, labels=IDS).loss.backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert trained
    assert all("lora_" in one for one in trained)
    before = [p.clone() for layer in found.values() for p in (master(layer, stack) for stack in layer.module.stacks)]
    with_adapters = logits(model)
    after = [p for layer in found.values() for p in (master(layer, stack) for stack in layer.module.stacks)]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))  # peft has put every parameter back
    with model.disable_adapter():
        assert not torch.equal(logits(model), with_adapters)
    with qkit.disabled(model):
        assert torch.allclose(logits(model), logits(with_peft(make(name, implementation), *STACKED)), atol=1e-6)
    merged = qkit.merge(model)
    assert not any("lora_" in one for one, _ in merged.named_parameters())
    prepared = logits(merged)
    converted = qkit.convert(merged)
    assert torch.equal(logits(converted), prepared)
    assert (
        prepared - with_adapters
    ).abs().max() < 0.5 * with_adapters.abs().max()  # a merge beside the grid moves values


@pytest.mark.filterwarnings("ignore:.*will be removed in v6:FutureWarning")  # peft's call
def test_pefts_target_parameters_on_converted_experts_and_other_parametrizations_are_refused():
    with pytest.raises((qkit.BackendError, ValueError), match="target_parameters"):
        with_peft(qkit.convert(make("mixtral"), "int4-g32"), *STACKED)(IDS)
    model = qkit.prepare(make("mixtral"), "int4-g32")
    layer = next(iter(blocks(model).values())).module
    torch.nn.utils.parametrize.register_parametrization(layer, "down_proj", torch.nn.Identity())
    with pytest.raises(qkit.BackendError, match="target_parameters"):
        model(IDS)


def test_a_width_that_groups_do_not_divide_is_refused_or_the_whole_block_is_skipped():
    recipe = qkit.Recipe("r", (qkit.Rule(("*",), "experts", qkit.Grid("int4", 64)),))
    with pytest.raises(qkit.GridError, match=r"experts\.down_proj: 96 inputs do not divide into groups of 64"):
        qkit.prepare(make("mixtral"), recipe)
    rules = (qkit.Rule(("*",), "experts", qkit.Grid("int4", 64), indivisible="skip"), qkit.recipe("int4-g32").rules[-1])
    model = qkit.prepare(make("mixtral"), qkit.Recipe("r", rules))
    assert {layer.stage for layer in blocks(model).values()} == {"float"}


def test_compiled_experts_compute_as_eager_ones():
    model = qkit.prepare(make("mixtral", "batched_mm"), "int4-g32")
    wanted = logits(model)
    compiled = torch.compile(model)
    with torch.no_grad():
        assert torch.allclose(compiled(IDS).logits, wanted, atol=1e-5)  # inductor orders products otherwise


def test_a_missing_expert_is_named(tmp_path):
    from safetensors.torch import load_file, save_file

    make("qwen3_moe").save_pretrained(tmp_path / "in")
    tensors = load_file(tmp_path / "in/model.safetensors")
    del tensors["model.layers.1.mlp.experts.2.up_proj.weight"]
    save_file(tensors, tmp_path / "in/model.safetensors", metadata={"format": "pt"})
    from qkit.streaming.plan import make_plan

    with pytest.raises(qkit.PlanError, match=r"mlp\.experts\.2\.up_proj is missing, and the block has 4 experts"):
        make_plan(tmp_path / "in", qkit.recipe("int4-g32"))


@pytest.mark.parametrize(("name", "recipe", "said"), [
    ("gpt_oss", "int4-g32", "no conversion that stacks"),
    ("qwen3_moe", "nvfp4-a16", "without the scale of the tensor"),
    ("qwen3_moe", "mxfp8-a16", "fails on experts with MXFP8"),
])  # fmt: skip
def test_the_plan_says_who_does_not_open_the_experts(name, recipe, said, tmp_path):
    from qkit.streaming.plan import make_plan

    make(name).save_pretrained(tmp_path / "in")
    assert json.loads((tmp_path / "in/config.json").read_text())["model_type"] == name
    found = [str(one) for one in make_plan(tmp_path / "in", qkit.recipe(recipe)).caveats]
    assert sum(said in one for one in found) == 2


def test_the_plan_says_that_transformers_drops_single_float_experts(tmp_path):
    from qkit.streaming.plan import make_plan

    make("qwen3_moe").save_pretrained(tmp_path / "in")
    recipe = qkit.Recipe("attention", (qkit.Rule(("*",), weight=qkit.Grid("int4", 32), indivisible="skip"),))
    found = [str(one) for one in make_plan(tmp_path / "in", recipe).caveats]
    assert sum("drops float experts" in one for one in found) == 2


def test_reports_compare_experts_one_by_one_and_put_their_values_back():
    from qkit.report.code_changes import compare_codes, packed_weights
    from qkit.report.master_weights import fill_with_values, recipe_of_layers

    one, other = (qkit.convert(make("gpt_oss"), name) for name in ("int4-g32", "int4-g32-absmax"))
    found = compare_codes(packed_weights(ENGINE, one), packed_weights(ENGINE, other))
    experts = [change for change in found if ".experts." in change.path]
    assert len(experts) == 2 * 4 * 3
    assert all(change.flipped for change in experts)
    assert torch.equal(logits(fill_with_values(ENGINE, one, into=make("gpt_oss"))), logits(one))
    again = qkit.convert(make("gpt_oss"), recipe_of_layers(ENGINE, one))
    assert torch.equal(logits(again), logits(one))
