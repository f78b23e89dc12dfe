"""Steps of training on a GPU: codes of all weights in one launch, and AdamW on weights that FSDP2 shards, in one process."""

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from torch import distributed, nn  # noqa: E402
from torch.profiler import ProfilerActivity, profile  # noqa: E402

import qkit  # noqa: E402

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
ENGINE = qkit.backend("torchao")


EDITS = {
    "nothing": lambda w: None,
    "in place": lambda w: w.detach().mul_(2),
    "unseen": lambda w: w.data.mul_(3),
    "other memory": lambda w: setattr(w, "data", w.data * 5),
}


class Blocks(nn.Module):
    """Weights of two widths, an embedding, and a norm that is not quantized."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.tokens = nn.Embedding(64, 128)
        self.up = nn.ModuleList(nn.Linear(128, 256, bias=False) for _ in range(3))
        self.down = nn.ModuleList(nn.Linear(256, 128) for _ in range(3))
        self.norm = nn.LayerNorm(128)

    def forward(self, ids):
        x = self.tokens(ids)
        for up, down in zip(self.up, self.down, strict=True):
            x = x + down(torch.relu(up(self.norm(x))))
        return x


def ids(step):
    return torch.randint(64, (4, 40), generator=torch.Generator().manual_seed(step)).cuda()


def names(act):
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as seen:
        act()
        torch.cuda.synchronize()
    return [event.name for event in seen.events()]


@pytest.mark.parametrize("recipe", ["float8-dynamic-act-float8-weight", "int8-dynamic-act-int8-weight"])
@pytest.mark.parametrize("ours", [False, True])
def test_codes_of_all_weights_are_computed_in_a_launch_for_each_width(recipe, ours):
    model = qkit.prepare(Blocks().to("cuda", torch.bfloat16), recipe).train()
    optimizer = qkit.adamw(model, lr=1e-2) if ours else torch.optim.AdamW(model.parameters(), lr=1e-2)
    first = None
    for step in range(4):
        loss = model(ids(step)).float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        first = first or float(loss.detach())
    launches = [name for name in names(lambda: model(ids(4))) if name.startswith("codes_of_many")]
    assert len(launches) == 2
    from qkit_torchao.cache import codes

    with torch.no_grad():
        for layer in (*model.up, *model.down):
            found, steps = codes.of(layer.weight, layer.weight_grid)
            want = ENGINE.quantize(layer.weight, layer.weight_grid)
            assert torch.equal(found.codes, want.codes)
            assert torch.equal(found.scales, want.scales)
            assert torch.equal(steps > 0, torch.ones_like(steps, dtype=torch.bool))
    assert float(loss.detach()) < first


@pytest.fixture(scope="module")
def mesh(tmp_path_factory):
    distributed.init_process_group(
        "nccl", init_method=f"file://{tmp_path_factory.mktemp('group')}/ranks", rank=0, world_size=1
    )
    yield distributed.device_mesh.init_device_mesh("cuda", (1,))
    distributed.destroy_process_group()


def losses(model, optimizer, steps=4):
    found = []
    for step in range(steps):
        loss = model(ids(step)).float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(float(loss.detach()))
    return found


@pytest.mark.parametrize("recipe", ["int4-g32", "mxfp4", "nvfp4-a16"])
def test_adamw_steps_shards_as_torchs_does_and_writes_what_is_gathered(mesh, recipe):
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    found = {}
    for name in ("torch", "ours", "whole"):
        model = qkit.prepare(Blocks().cuda(), recipe).train()
        if name != "whole":
            for one in (*model.up, *model.down):
                fully_shard(one, mesh=mesh, mp_policy=policy)
            fully_shard(model, mesh=mesh, mp_policy=policy)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2) if name == "torch" else qkit.adamw(model, lr=1e-2)
        found[name] = losses(model, optimizer)
        if name == "whole":
            continue
        launches = names(lambda: losses(model, optimizer, steps=1))  # noqa: B023
        assert any(one.startswith("adamw_of_many") for one in launches) == (name == "ours")
        if recipe == "int4-g32":  # values of its parts are those of a launch, unless AdamW has written them
            assert sum(one.startswith("values_of_many") for one in launches) == (1 if name == "torch" else 0)
        state = optimizer.state[model.up[0].weight]
        assert type(state["exp_avg"]) is type(model.up[0].weight.detach())
        wholes = {path: one.full_tensor().detach() for path, one in model.named_parameters()}
        for path in ("up.1", "down.2"):
            layer = model.get_submodule(path)
            layer.unshard()
            want = qkit.fake_quantize(wholes[f"{path}.weight"], layer.weight_grid).bfloat16()
            assert torch.equal(layer.weight, want)
            layer.reshard()
    assert found["ours"] == pytest.approx(found["torch"], rel=2e-3)  # one rounds after other steps than the other
    assert found["ours"][-1] < found["ours"][0]


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("recipe", ["int4-g32", "float8-dynamic-act-float8-weight", "int8-dynamic-act-int8-weight"])
def test_launches_prepared_after_a_step_compute_the_weights_as_they_are_when_they_are_used(recipe, edit):
    model = qkit.prepare(Blocks().to("cuda", torch.bfloat16), recipe).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses(model, optimizer)
    EDITS[edit](model.up[1].weight)
    found = model(ids(9))
    twin = qkit.prepare(Blocks().to("cuda", torch.bfloat16), recipe).train()
    twin.load_state_dict(model.state_dict())
    want = twin(ids(9))
    assert torch.equal(found, want)
    for one in (found, want):
        one.float().square().mean().backward()
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)
