"""Two processes, on the CPU: what they train together is what one trains alone, and it is gathered to the same bytes."""

import re
from importlib.util import find_spec
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
    pytest.skip("torch was built without gloo", allow_module_level=True)

import parallel  # noqa: E402
import processes  # noqa: E402
import resumed  # noqa: E402
import shards  # noqa: E402
from processes import GRID, adam, batch, codes, net, ours, train, with_adapters  # noqa: E402

import qkit  # noqa: E402

NEAR = 1e-5  # of losses: two halves are summed in another order, and a weight near a tie may take the other code
ALONE = {
    "adam": (torch.float32, adam, {}),
    "ours": (torch.float32, ours, {}),
    "accumulated": (torch.float32, adam, {}),
    "checkpointed": (torch.float32, adam, {}),
    "compiled": (torch.float32, adam, {}),
    "DDP": (torch.float32, adam, {}),
    "accelerate": (torch.float32, ours, {}),
    "autocast": (torch.float32, adam, {"autocast": True}),
    "bfloat16": (torch.bfloat16, adam, {}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    torch.multiprocessing.spawn(processes.run, (str(folder),), processes.RANKS)
    return folder


@pytest.fixture(scope="module")
def seen(folder):
    seen = [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(processes.RANKS)]
    assert not find_spec("accelerate") or "accelerate" in seen[0]
    return seen


def _want(seen, case):
    if case not in seen[0]:
        pytest.skip("accelerate is not installed")


@pytest.mark.parametrize("case", ALONE)
def test_losses_are_those_of_one_process(seen, case):
    _want(seen, case)
    dtype, make, options = ALONE[case]
    model = net(dtype)
    want = train(model, make(model), **options)
    near = (
        NEAR if (dtype, options) == (torch.float32, {}) else 2e-3
    )  # sums are rounded to 8 bits, here and there in other places
    for one in seen:
        assert one[case]["losses"] == pytest.approx(want, rel=near)
    assert want[0] != pytest.approx(want[-1], rel=near)  # it moves


@pytest.mark.parametrize("case", ALONE)
def test_codes_are_those_of_the_gathered_masters(seen, case):
    _want(seen, case)
    masters, found = seen[0][case]["masters"], seen[0][case]["codes"]
    assert found.keys() == {"tokens", "first.0", "second.0"}
    for path, mine in found.items():
        assert torch.equal(mine, qkit.quantize(masters[f"{path}.weight"], GRID).codes)
    assert seen[0][case]["kind"] == "Net"
    assert ("codes" in seen[1][case]) == (case == "DDP")  # every process has the whole model there


def test_the_artifact_of_shards_has_the_bytes_of_the_whole_models(seen, folder, tmp_path):
    model = net()
    model.load_state_dict(seen[0]["ours"]["masters"])
    alone = qkit.save(qkit.convert(model), tmp_path / "alone")
    sharded = Path(folder) / "sharded"
    files = sorted(file.name for file in alone.iterdir())
    assert files == sorted(file.name for file in sharded.iterdir())
    for name in files:
        assert (alone / name).read_bytes() == (sharded / name).read_bytes()


def test_adapters_that_are_sharded_train_and_merge_as_in_one_process(seen):
    model = with_adapters()
    want = train(model, adam(model))
    assert all(one["adapted"]["losses"] == pytest.approx(want, rel=NEAR) for one in seen)
    assert want[0] != pytest.approx(want[-1], rel=NEAR)
    alone, sharded = codes(qkit.merge(model)), seen[0]["adapted"]["codes"]
    assert alone.keys() == sharded.keys()
    equal = torch.cat([(alone[path] == sharded[path]).flatten() for path in alone]).double().mean()
    assert equal > 0.999  # halves of the batch are summed in another order


def test_nothing_of_the_size_of_a_weight_is_kept_for_backward(seen):
    assert max(one["sizes"] for one in seen) == 4 * 97  # a hidden state; the smallest weight has 51 * 96


def test_an_edit_of_the_shards_is_seen(seen):
    for name, factor in (("edited", -2), ("edited again", -4)):
        model = net()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(factor)
            assert torch.equal(seen[0][name], model(batch(0)[0]))


def test_a_sharded_model_is_switched_off(seen):
    model = net()
    with torch.no_grad(), qkit.disabled(model):
        assert torch.equal(seen[0]["disabled"], model(batch(0)[0]))


ONE_GRID = (
    "policy",
    "inputs not cast",
    "sharded before",
    "computed before",
    "left whole",
    "resharded to one",
    "offloaded",
    *shards.MESHES,
)


@pytest.mark.parametrize("case", ONE_GRID)
def test_every_way_to_shard_trains_on_the_values_of_fp32_masters(seen, case):
    model = shards.build(shards.Net, shards.GRID)
    want = train(model, shards.adam(model), autocast=True)
    for one in seen:
        assert one["shards"][case]["wrong"] == 0
        assert one["shards"][case]["count"] == 51 * 64 + 97 * 64 + 51 * 96
        assert one["shards"][case]["losses"] == pytest.approx(want, rel=2e-3)  # sums are rounded to 8 bits elsewhere
        same = one["shards"]["policy"]["losses"]
        assert one["shards"][case]["losses"] == (pytest.approx(same, rel=2e-3) if case == "inputs not cast" else same)


@pytest.mark.parametrize("grid", shards.GRIDS, ids=str)
@pytest.mark.parametrize("dim", ["outputs", "inputs"])
def test_scales_of_rows_and_tensors_are_those_of_the_whole_weight(seen, grid, dim):
    model = shards.build(shards.Net if dim == "outputs" else shards.Even, grid)
    want = train(model, shards.adam(model), autocast=True)
    for one in seen:
        found = one["shards"][f"{grid}, along {dim}"]
        assert found["wrong"] == 0
        assert found["losses"] == pytest.approx(want, rel=3e-3)  # sums are rounded to 8 bits elsewhere


def test_shards_along_inputs_have_whole_groups(seen):
    assert all(one["shards"]["along inputs"]["wrong"] == 0 for one in seen)


def test_layers_that_share_a_tensor_scale_share_it_over_processes(seen):
    assert all(one["shards"]["fused"]["wrong"] == 0 for one in seen)


def test_weights_that_are_gathered_together_are_asked_for_once_and_follow_every_change(seen):
    for one in seen:
        assert one["shards"]["block"]["wrong"] == 0
        found = dict(one["shards"]["together"])
        assert found.pop("masters") == (False, True)
        assert found.keys() == {"trained", "q_proj assigned", "k_proj assigned", "another grid"}
        for losses, asked, wrong, count in found.values():
            assert (asked, wrong, count) == (1, 0, 51 * 64 + 3 * 33 * 64)
            assert losses[0] != pytest.approx(losses[-1], rel=NEAR)


@pytest.mark.parametrize("grid", shards.PACKED, ids=str)
def test_codes_are_gathered_with_the_losses_and_values_of_gathered_values(seen, grid):
    for one in seen:
        values, packed = (one["shards"]["codes"][f"{grid}, {way}"] for way in (False, True))
        assert packed["losses"] == values["losses"]
        assert len(set(packed["losses"])) > 1
        assert packed["wrong"] == 0 < packed["count"]
        assert torch.equal(packed["off"], values["off"])
        assert packed["bytes"] < values["bytes"] * (grid.element.bits + 2) / 16


def test_models_whose_codes_cannot_be_gathered_are_refused_by_name(seen):
    for one in seen:
        found = one["shards"]["codes"]["refused"]
        assert "call prepare and fully_shard first" in found["float"]
        assert "call prepare and fully_shard first" in found["whole"]
        assert "a weight [33, 64] has rows that 2 processes do not share evenly" in found["uneven"]
        assert "has scales that depend on several processes" in found["of tensors"]


def test_the_gradient_of_clipped_weights_is_masked_where_they_lie(seen):
    model = shards.build(shards.Net, shards.GRID, ste="masked")
    want = train(model, shards.adam(model), autocast=True)
    for one in seen:
        assert one["shards"]["masked"]["losses"] == pytest.approx(want, rel=2e-3)
        assert one["shards"]["masked"]["losses"] != one["shards"]["policy"]["losses"]


def test_without_a_policy_the_values_are_float32(seen):
    assert all(one["shards"]["no policy"]["losses"] == one["adam"]["losses"] for one in seen)
    assert all(one["shards"]["no policy"]["wrong"] == 0 for one in seen)


def test_edits_and_assigned_states_are_quantized_and_checkpoints_are_plain(seen):
    for one in seen:
        edits = one["shards"]["edits"]
        assert {edits["first"][0], edits["edited"][0], edits["assigned"][0]} == {0}
        assert edits["plain"] == {"Tensor"}


def test_a_policy_and_a_model_that_is_switched_off(seen):
    model = shards.build(shards.Net, shards.GRID).to(torch.bfloat16)
    with torch.no_grad(), qkit.disabled(model):
        for one in model.parameters():
            one.mul_(-2)
        assert torch.equal(seen[0]["shards"]["edits"]["off"].bfloat16(), model(batch(0)[0]))


@pytest.mark.parametrize("number", range(len(shards.SAVED)))
def test_parts_are_saved_to_the_bytes_of_the_whole(seen, folder, number):
    whole, parts = (Path(folder) / f"{kind}-{number}" for kind in ("whole", "parts"))
    files = sorted(file.name for file in whole.iterdir())
    assert files == sorted(file.name for file in parts.iterdir())
    assert "model.safetensors" in files
    assert all((whole / name).read_bytes() == (parts / name).read_bytes() for name in files)


def test_a_weight_that_is_not_finite_is_refused_in_every_process(seen, folder):
    assert {one["not finite"] for one in seen} == {
        "first.0.weight has numbers that are not finite: no code stands for them"
    }
    assert not [file for file in Path(folder).iterdir() if "never" in file.name]


@pytest.mark.parametrize("name", resumed.MADE)
@pytest.mark.parametrize("way", resumed.WAYS)
def test_a_run_goes_on_from_a_checkpoint_of_torchs_with_the_same_losses_and_codes(seen, way, name):
    for one in seen:
        whole, resumed_run = one["resumed"][f"{way}, {name}"]
        assert resumed_run["losses"] == whole["losses"]
        assert len(set(whole["losses"])) == 4
    whole, resumed_run = seen[0]["resumed"][f"{way}, {name}"]
    assert whole["codes"].keys() == resumed_run["codes"].keys() == {"tokens", "first.0", "second.0"}
    assert all(torch.equal(codes, resumed_run["codes"][path]) for path, codes in whole["codes"].items())


def _parallel(seen):
    if "parallel" not in seen[0]:
        pytest.skip("transformers or accelerate is not installed")
    return [one["parallel"] for one in seen]


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("grid", ["int4-g32-signed", "int8-row-absmax", "int8-tensor-absmax", "e2m1-g16-nvfp4"])
def test_a_tensor_parallel_plan_trains_the_codes_of_one_process(seen, grid, late):
    torch.manual_seed(0)
    model = qkit.prepare(shards.Even(), shards.recipe(qkit.Grid.parse(grid)))
    want = parallel.steps(model, parallel.of_tokens)
    for one in _parallel(seen):
        assert one[f"plan, {grid}, {late}"]["losses"] == pytest.approx(want, rel=NEAR)
    mine, theirs = parallel.codes(model), _parallel(seen)[0][f"plan, {grid}, {late}"]["codes"]
    assert mine.keys() == theirs.keys()
    equal = torch.cat([(mine[path] == theirs[path]).flatten() for path in mine]).double().mean()
    assert equal > 0.999  # products are summed in another order


@pytest.mark.parametrize("name", parallel.ACTIVE)
def test_inputs_are_quantized_whole_where_a_plan_splits_them(seen, name):
    torch.manual_seed(0)
    want = parallel.steps(qkit.prepare(shards.Even(), name), parallel.of_tokens)
    for one in _parallel(seen):
        assert one[f"plan, {name}, True"]["losses"] == pytest.approx(want, rel=NEAR)


@pytest.mark.parametrize("name", parallel.ACTIVE)
def test_transformers_own_plan_trains_on_the_grid(seen, name, tmp_path):
    observed = _parallel(seen)
    want = parallel.steps(qkit.prepare(parallel.llama(tmp_path), name), parallel.of_language)
    for one in observed:
        assert one[f"auto, {name}"] == pytest.approx(
            want, rel=1e-4
        )  # products are summed in another order, many layers deep
    float_losses = parallel.steps(parallel.llama(tmp_path), parallel.of_language)
    assert want[0] != pytest.approx(float_losses[0], rel=1e-5)  # that test would see a plan without a grid


@pytest.mark.parametrize("kind", parallel.CONFIGURED)
def test_transformers_distributed_config_trains_on_the_grid(seen, folder, kind, tmp_path):
    observed = _parallel(seen)
    if "configured" not in observed[0]:
        pytest.skip("transformers has no distributed_config")
    want = parallel.steps(qkit.prepare(parallel.llama(tmp_path), "int4-g32"), parallel.of_language)
    for one in observed:
        found = one["configured"][kind]
        near = {"mixed": 2e-3, "tensors": 1e-4}.get(kind, NEAR)  # products are in bfloat16, or summed in another order
        assert found["losses"] == pytest.approx(want, rel=near)
        assert found.get("wrong", 0) == 0
    whole, parts = (folder / f"configured-{kind}-{name}" / "model.safetensors" for name in ("whole", "parts"))
    assert whole.exists()
    assert kind == "tensors" or parts.read_bytes() == whole.read_bytes()


def test_transformers_trainer_trains_with_fsdp2_and_bf16(seen, folder):
    for one in _parallel(seen):
        losses = one["trainer"]
        assert len(losses["plain"]) == 3
        assert losses["plain"] == losses["RAM"] == losses["checkpoints"]
    files = sorted(Path(folder).glob("trained-*/model.safetensors"))
    assert len(files) == 2 * len(parallel.SETTINGS)  # gathered, and saved by parts
    assert len({file.read_bytes() for file in files}) == 1


def test_ranges_that_average_see_the_inputs_of_all_processes(seen):
    one, other = (found["right"] for found in _parallel(seen))
    for kind in ("ranges", "ranges of FSDP2"):
        assert one[kind].keys() == {"first.0.input_range", "second.0.input_range"}
        assert all(torch.equal(value, other[kind][name]) for name, value in one[kind].items())
    assert one["converted"]
    assert other["converted"]


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("split groups", "GridError: a plan splits groups of 128: a weight .52, 128. .* 64 in each"),
        ("other recipes", "StageError: processes disagree on the rule of a weight .52, 64."),
        (
            "other recipes of replicas",
            "StageError: processes disagree on the layers of a model, of which this one has 3, int4",
        ),
        ("other adapters of replicas", "StageError: processes disagree on the layers of a model, .* adapter times"),
        ("other adapters", "StageError: processes disagree on a layer, which is .* adapter times"),
        ("spread codes", "StageError: a converted layer has codes and no weight, .* parallelize the prepared model"),
        ("partitioned factors", "StageError: DeepSpeed ZeRO-3 has partitioned a weight"),
        ("learned", "StageError: FSDP rounds master weights .* depend on more than the weight"),
        ("learned late", "StageError: cannot prepare: tokens is sharded over processes"),
        ("rounded factors", "StageError: FSDP rounds lora_A from float32 to bfloat16"),
        ("partitioned", "StageError: DeepSpeed ZeRO-3 has partitioned a weight .128, 64."),
        ("prepare partitioned", "StageError: DeepSpeed ZeRO-3 has partitioned a weight .128, 64."),
        ("FSDP1, True", "StageError: a weight .52, 64. was gathered by something other than FSDP2, as FSDP1 does"),
        ("FSDP1, False", "StageError: a weight .52, 64. was gathered by something other than FSDP2, as FSDP1 does"),
        ("FSDP1 first, True", "StageError: a weight .* was gathered by something other than FSDP2"),
        ("FSDP1 first, False", "StageError: a weight .* was gathered by something other than FSDP2"),
    ],
)
def test_bad_distribution_is_refused_by_name(seen, case, message):
    for one in _parallel(seen):
        assert re.match(message, one["refused"][case])


@pytest.mark.parametrize(
    ("verb", "message"),
    [
        ("convert", "cannot convert: tokens is sharded over processes; call whole = qkit.gather"),
        ("save", "cannot save: tokens is sharded over processes; call whole = qkit.gather"),
        ("adapt", "cannot adapt: tokens is sharded over processes; adapt the model first and shard it then"),
        ("put", "cannot adapt: tokens is sharded over processes; adapt the model first and shard it then"),
        ("merge", "cannot merge: tokens is sharded over processes; call whole = qkit.gather"),
        ("keep", "cannot save: first.0 is sharded over processes; call whole = qkit.gather"),
        ("rounded", "FSDP rounds master weights from float32 to bfloat16 .* leave param_dtype out"),
    ],
)
def test_what_would_go_wrong_is_refused_by_name(seen, verb, message):
    for one in seen:
        assert re.search(message, one["errors"][verb])
