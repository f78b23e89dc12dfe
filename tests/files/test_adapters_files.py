"""Adapters in files: to and from peft and mlx-lm, by the command line, and what is refused."""

import json
import shutil

import numpy as np
import pytest
from models import CONFIG, build, logits
from safetensors.numpy import load_file, save_file
from tables import BUILDERS as ENGINES
from typer.testing import CliRunner

import qkit
from qkit import adapters
from qkit.adapters import Adapter, Update
from qkit.adapters.surgery import put
from qkit.cli.application import application
from qkit.engines.trainer import TrainerOptions

KINDS = ["lora", "dora"]
TARGETS = ("*.q_proj", "*.down_proj")
RECIPE = "int4-g64"
NEAR = 2**-10  # of what the adapter does: factors have 12 bits here and 24 there
LAYOUTS = {"torchao": "peft", "mlx": "mlx-lm"}

peft_asks = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft 0.21 on transformers 5
only = {name: pytest.mark.skipif(name not in ENGINES, reason=f"{name} builds no Llama here") for name in LAYOUTS}


def adapted(name, *, kind="lora", base="prepared", match=TARGETS, rank=4):
    """A Llama with adapters that do something."""
    model = qkit.prepare(build(name), RECIPE) if base == "prepared" else qkit.convert(build(name), RECIPE)
    engine = qkit.backend(name)
    model = qkit.adapt(model, Adapter(rank=rank, alpha=10.0, kind=kind, match=match))
    updates = {layer.path: engine.adapter_update(layer.module) for layer in engine.layers(model) if layer.adapter}
    return put(engine, qkit.merge(model), {path: moved(one) for path, one in updates.items()})


def moved(update):
    """With a B, and a magnitude, that were trained."""
    random = np.random.default_rng(update.shape)
    b = (random.standard_normal(update.b.shape) * 0.3).astype(np.float32)
    magnitude = update.magnitude
    if magnitude is not None:
        magnitude = (magnitude * (1 + random.standard_normal(len(magnitude)) * 0.05)).astype(np.float32)
    return Update(update.a, b, update.scale, magnitude)


def float_logits(name, model):
    with qkit.disabled(model):
        return logits(name, model)


def assert_near(got, want, base):
    """Near to each other, compared with how far the adapter moved them from the base."""
    np.testing.assert_allclose(got, want, rtol=0, atol=NEAR * np.abs(want - base).max())


def updates(name, model):
    engine = qkit.backend(name)
    return {layer.path: engine.adapter_update(layer.module) for layer in engine.layers(model) if layer.adapter}


def assert_same_updates(some, others):
    assert some.keys() == others.keys()
    for path, one in some.items():
        assert one.scale == others[path].scale
        assert one.parts().keys() == others[path].parts().keys()
        for part, array in one.parts().items():
            np.testing.assert_array_equal(array, others[path].parts()[part])


# Ours


@pytest.mark.parametrize("layout", ["peft", "mlx-lm"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ENGINES)
def test_what_is_saved_is_loaded_on_every_engine(name, kind, layout, tmp_path):
    model = adapted(name, kind=kind)
    adapters.save(model, tmp_path, layout=layout)
    for other in ENGINES:
        loaded = adapters.load(qkit.prepare(build(other), RECIPE), tmp_path)
        assert_same_updates(updates(name, model), updates(other, loaded))


@pytest.mark.parametrize("name", ENGINES)
def test_ranks_and_scales_that_differ_are_kept(name, tmp_path):
    model = adapted(name, match=("*.q_proj",))
    model = qkit.adapt(model, Adapter(rank=3, alpha=7.0, match=("*.v_proj",)))
    adapters.save(model, tmp_path / "peft")
    loaded = adapters.load(qkit.prepare(build(name), RECIPE), tmp_path / "peft")
    assert_same_updates(updates(name, model), updates(name, loaded))
    with pytest.raises(
        qkit.ArtifactError, match=r"mlx-lm has one rank for all layers, and these have 3, 4: save them apart"
    ):
        adapters.save(model, tmp_path / "mlx", layout="mlx-lm")
    model = qkit.adapt(model, Adapter(kind="dora", match=("*.k_proj",)))
    with pytest.raises(qkit.ArtifactError, match="peft has one kind for all layers"):
        adapters.save(model, tmp_path / "mixed")


@pytest.mark.parametrize("name", ENGINES)
def test_two_writes_are_the_same_bytes(name, tmp_path):
    model = adapted(name)
    for folder in ("a", "b"):
        adapters.save(model, tmp_path / folder)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


# peft


@only["torchao"]
@peft_asks
@pytest.mark.parametrize(
    "wishes", [{}, {"use_dora": True}, {"use_rslora": True}, {"alpha_pattern": {"down_proj": 3}}], ids=str
)
def test_an_adapter_of_pefts_gives_pefts_logits_in_float(wishes, tmp_path):
    peft = pytest.importorskip("peft")
    import torch

    theirs = peft.get_peft_model(
        build("torchao"), peft.LoraConfig(target_modules=["q_proj", "down_proj"], r=4, **wishes)
    )
    torch.manual_seed(0)
    engine = qkit.backend("torchao")
    trainer = engine.trainer(theirs, TrainerOptions(weight_decay=0.0))
    tokens = np.random.default_rng(1).integers(0, 256, (4, 17)).astype(np.int32)
    for _ in range(5):
        trainer.step([tokens], learning_rate=3e-2)
    theirs.save_pretrained(tmp_path)
    ours = adapters.load(qkit.prepare(build("torchao"), RECIPE), tmp_path)
    assert_near(float_logits("torchao", ours), logits("torchao", theirs), logits("torchao", build("torchao")))
    for name in ENGINES:
        on_engine = adapters.load(qkit.prepare(build(name), RECIPE), tmp_path)
        assert_near(float_logits(name, on_engine), logits("torchao", theirs), logits("torchao", build("torchao")))


@only["torchao"]
@peft_asks
@pytest.mark.parametrize("kind", KINDS)
def test_ours_opens_in_peft(kind, tmp_path):
    peft = pytest.importorskip("peft")
    ours = qkit.adapt(adapted("torchao", kind=kind), Adapter(rank=3, kind=kind, match=("*.v_proj",)))
    adapters.save(ours, tmp_path)
    theirs = peft.PeftModel.from_pretrained(build("torchao"), tmp_path)
    assert_near(float_logits("torchao", ours), logits("torchao", theirs), logits("torchao", build("torchao")))


# mlx-lm


@only["mlx"]
@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_of_mlx_lms_gives_its_logits_in_float(kind, tmp_path):
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm.tuner.utils import linear_to_lora_layers

    parameters = {"rank": 4, "scale": 3.0, "dropout": 0.0, "keys": ["self_attn.q_proj", "mlp.down_proj"]}
    theirs = build("mlx")
    theirs.freeze()
    linear_to_lora_layers(theirs, 1, parameters, use_dora=kind == "dora")
    mx.random.seed(0)
    moved = [
        (name, mx.random.normal(one.shape) * 0.3) for name, one in tree_flatten(theirs.parameters()) if "lora_b" in name
    ]
    theirs.load_weights(moved, strict=False)
    trained = dict(tree_flatten(theirs.trainable_parameters()))
    mx.save_safetensors(str(tmp_path / "adapters.safetensors"), trained)
    config = {"fine_tune_type": kind, "num_layers": 1, "lora_parameters": parameters}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    for name in ENGINES:
        ours = adapters.load(qkit.prepare(build(name), RECIPE), tmp_path)
        assert_near(float_logits(name, ours), logits("mlx", theirs), logits("mlx", build("mlx")))


@only["mlx"]
@pytest.mark.parametrize("kind", KINDS)
def test_ours_opens_in_mlx_lm(kind, tmp_path):
    from mlx_lm.tuner.utils import load_adapters

    ours = adapted("mlx", kind=kind)
    adapters.save(ours, tmp_path, layout="mlx-lm")
    theirs = load_adapters(build("mlx"), str(tmp_path))
    assert_near(float_logits("mlx", ours), logits("mlx", theirs), logits("mlx", build("mlx")))


# The command line


def run(*arguments):
    return CliRunner().invoke(application, [str(one) for one in arguments])


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A float directory, an artifact of it, and an adapter of each."""
    home = tmp_path_factory.mktemp("merge")
    name = ENGINES[0]
    qkit.save(build(name), home / "float")
    (home / "float" / "config.json").write_text(json.dumps(CONFIG))
    qkit.save(qkit.convert(build(name), RECIPE), home / "artifact", source=home / "float")
    adapters.save(adapted(name, kind="dora"), home / "of-float")
    adapters.save(adapted(name, base="converted"), home / "of-artifact")
    return home


@pytest.mark.parametrize("backend", ENGINES)
def test_the_command_makes_the_codes_of_training(folders, tmp_path, backend):
    for base, model in (
        ("float", adapted(ENGINES[0], kind="dora")),
        ("artifact", adapted(ENGINES[0], base="converted")),
    ):
        recipe = ["--recipe", RECIPE] if base == "float" else []
        done = run("merge", folders / base, folders / f"of-{base}", tmp_path / base, *recipe, "--backend", backend)
        assert done.exit_code == 0, done.output
        assert "4 adapters merged, " in done.output
        model = qkit.merge(model)
        qkit.save(qkit.convert(model) if recipe else model, tmp_path / f"want-{base}", source=folders / "float")
        want, got = (load_file(tmp_path / one / "model.safetensors") for one in (f"want-{base}", base))
        assert want.keys() == got.keys()
        for key in want:
            np.testing.assert_array_equal(got[key], want[key], err_msg=key)
        (base_file,) = (folders / "artifact").glob("*.safetensors")
        start = load_file(base_file)
        assert any((start[key] != got[key]).any() for key in start if key.endswith("weight_packed"))


@pytest.mark.parametrize(
    ("base", "adapter", "recipe", "says"),
    [
        ("float", "of-float", None, "is not quantized: prepare or convert it"),
        ("float", "of-float", "int4-g32", r"with grid .*64.*, and the model's has .*32"),
        (
            "float",
            "of-artifact",
            RECIPE,
            r"for another base: .* was trained with weights \w{32}, and the model's has \w{32}",
        ),
        ("artifact", "of-artifact", RECIPE, "converted already"),
        ("artifact", "nothing", None, "neither adapter_model.safetensors or adapters.safetensors"),
    ],
)
def test_the_command_refuses(folders, tmp_path, base, adapter, recipe, says):
    done = run("merge", folders / base, folders / adapter, tmp_path / "out", *(["-r", recipe] if recipe else []))
    assert isinstance(done.exception, qkit.QkitError)
    with pytest.raises(qkit.QkitError, match=says):
        raise done.exception
    assert not (tmp_path / "out").exists()


# Other people's files


@pytest.fixture
def folder(tmp_path):
    adapters.save(adapted(ENGINES[0]), tmp_path / "adapter")
    return tmp_path / "adapter"


def load(folder):
    return adapters.load(qkit.prepare(build(ENGINES[0]), RECIPE), folder)


def edit(folder, **changes):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_the_files_are_sound_as_they_are(folder):
    assert len(updates(ENGINES[0], load(folder))) == 4


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3': qkit knows LORA"),
        ({"lora_alpha": "16"}, "lora_alpha is '16': want a number"),
        ({"lora_alpha": float("inf")}, "lora_alpha is inf: want a number"),
        ({"alpha_pattern": {"(a+)+b": 3}}, r"alpha_pattern has '\(a\+\)\+b': qkit reads names"),
        ({"alpha_pattern": [3]}, "alpha_pattern is .*: want a table"),
        ({"bias": "all"}, "bias = 'all', and qkit's adapters leave biases alone"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save = .* is more than LoRA"),
        ({"lora_bias": True}, "lora_bias = True is more than LoRA"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa' changed the base's weights"),
        ({"init_lora_weights": ["pissa"]}, "init_lora_weights = .* changed the base's weights"),
        ({"use_dora": True}, "lacks its magnitude"),
    ],
)
def test_a_configuration_that_means_more_is_refused(folder, changes, says):
    edit(folder, **changes)
    with pytest.raises(qkit.ArtifactError, match=says):
        load(folder)


def narrowed(tensors):
    return {name: array[:, :4] if "lora_A" in name else array for name, array in tensors.items()}


def renamed(old, new):
    return lambda tensors: {name.replace(old, new): array for name, array in tensors.items()}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: {}, "holds no adapter"),
        (lambda t: {**t, "base_model.model.lm_head.weight": np.zeros(2)}, r"lm_head.weight is no part of LoRA"),
        (lambda t: dict(list(t.items())[1:]), "lacks its a"),
        (lambda t: {name: array * np.float32("nan") for name, array in t.items()}, "holds a NaN"),
        (lambda t: {name: array[..., None] for name, array in t.items()}, r"A is \(4, \d+, 1\)"),
        (narrowed, r"its \S+ is \[128, 4\], and the model's is \[128, \d+\]"),
        (renamed("q_proj", "qkv_proj"), r"it updates '\S+qkv_proj', and the model has model"),
        (renamed("model.layers.0.self_attn.q_proj", "lm_head"), "lm_head cannot take an adapter"),
    ],
)
def test_weights_for_another_base_or_none_are_refused(folder, change, says):
    file = folder / "adapter_model.safetensors"
    save_file(change(load_file(file)), file)
    with pytest.raises(qkit.ArtifactError, match=says):
        load(folder)


def test_files_that_are_no_adapter_are_refused(folder, tmp_path):
    file = folder / "adapter_model.safetensors"
    whole = file.read_bytes()
    for metadata in ({"qkit": "{"}, {"qkit": "[]"}, {"qkit": '{"a": 1}'}):
        save_file(load_file(file), file, metadata=metadata)
        with pytest.raises(qkit.ArtifactError, match="the qkit metadata is not readable"):
            load(folder)
    file.write_bytes(whole[:-1])
    with pytest.raises(qkit.ArtifactError, match="fetch it again"):
        load(folder)
    file.write_bytes(whole)
    shutil.copy(file, folder / "adapters.safetensors")
    with pytest.raises(qkit.ArtifactError, match=r"has both adapter_model.safetensors or adapters.safetensors"):
        load(folder)
    with pytest.raises(qkit.ArtifactError, match=r"holds an adapter in adapters.safetensors: choose another folder"):
        adapters.save(adapted(ENGINES[0]), folder)
    (folder / "adapters.safetensors").unlink()
    (folder / "adapter_config.json").unlink()
    with pytest.raises(qkit.ArtifactError, match=r"has no adapter_config.json"):
        load(folder)
    (folder / "adapter_config.json").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(qkit.ArtifactError, match="a link to nothing"):
        load(folder)
    with pytest.raises(qkit.ArtifactError, match="unknown layout 'gguf': choose one of peft, mlx-lm"):
        adapters.save(adapted(ENGINES[0]), tmp_path / "x", layout="gguf")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"fine_tune_type": "full"}, "fine_tune_type is 'full': qkit knows lora and dora"),
        ({"lora_parameters": {"rank": 4}}, "lora_parameters.scale is None: want a number"),
        ({"lora_parameters": 4}, "lora_parameters is 4: want a table"),
        ({"fine_tune_type": "dora"}, "lacks its magnitude"),
    ],
)
def test_a_configuration_of_mlx_lms_that_means_more_is_refused(tmp_path, changes, says):
    adapters.save(adapted(ENGINES[0]), tmp_path, layout="mlx-lm")
    edit(tmp_path, **changes)
    with pytest.raises(qkit.ArtifactError, match=says):
        load(tmp_path)


@pytest.mark.parametrize("name", ENGINES)
def test_another_base_is_told_by_its_weights_type_and_grid(tmp_path, name):
    adapters.save(adapted(name), tmp_path)
    with pytest.raises(
        qkit.ArtifactError, match=r"for another base: \S+ was trained with dtype float32, and the model's has bfloat16"
    ):
        adapters.load(qkit.prepare(build(name, dtype="bfloat16"), RECIPE), tmp_path)
    with pytest.raises(qkit.ArtifactError, match="was trained with grid"):
        adapters.load(qkit.prepare(build(name), "mxfp4-a16"), tmp_path)
    with pytest.raises(qkit.ArtifactError, match="was trained with weights"):
        adapters.load(qkit.convert(build(name), RECIPE), tmp_path)
    with pytest.raises(qkit.ArtifactError, match="has an adapter already"):
        adapters.load(adapted(name), tmp_path)
