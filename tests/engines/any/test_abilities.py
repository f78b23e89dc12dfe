"""What an engine offers, and which keys of a recipe it honours: one way to ask, and one error for each."""

import re
from pathlib import Path

import pytest

import qkit
from qkit.engines import blocks, mixtures, norms, protocol, solving, translation, tuning
from qkit.engines.abilities import offers, require, want_honored
from qkit.engines.numpy import NumpyBackend
from qkit.engines.protocol import Adapts, Arrays, Builds, Deploys, Modules, Trains
from qkit.rules import Recipe, Rule

CORE = Path(qkit.__file__).parent
READY = [status.name for status in qkit.backends() if status.ready]
FULL = {Arrays, Modules, Adapts, Builds, Trains}
OFFERED = {"numpy": {Arrays}, "torchao": {*FULL, Deploys}, "mlx": FULL}
WEIGHT = qkit.Grid("int4", 32)
WITH_KEY = {
    "activation": Rule(("*",), weight=WEIGHT, activation=qkit.Grid("int8", "row")),
    "output": Rule(("*",), weight=WEIGHT, output=qkit.Grid("int8", "row")),
    "range": Rule(("*",), weight=WEIGHT, activation=qkit.Grid("int8", "tensor"), range="average"),
    "ste": Rule(("*",), weight=WEIGHT, ste="masked"),
    "scales": Rule(("*",), weight=WEIGHT, scales="learned"),
}


class Few(NumpyBackend):
    """An engine of modules without adapters, training and models."""

    name = "few"
    layers = weight = make_layer = prepare_layer = switch_mode = clear_ranges = pack = unpack = replace = run_layer = (
        len
    )
    tensors = fill = gather = config = len


@pytest.mark.parametrize("name", [name for name in READY if name in OFFERED])
def test_an_engine_offers_what_it_claims(name):
    engine = qkit.backend(name)
    assert {one for one in (*FULL, Deploys) if offers(engine, one)} == OFFERED[name]
    for one in OFFERED[name]:
        assert require(engine, one) is engine


def test_the_error_names_the_engine_and_the_verbs_that_it_lacks():
    lacking = r"'few' cannot train adapters: it lacks adapt, adapter_update, merge_adapter, train_only_adapters; choose torchao"
    with pytest.raises(qkit.BackendError, match=lacking):
        require(Few(), Adapts)
    with pytest.raises(
        qkit.BackendError, match="'few' cannot build and run language models: it lacks build, loss, logits;"
    ):
        require(Few(), Builds)


@pytest.mark.parametrize("protocol", [Modules, Adapts, Builds, Trains, Deploys])
def test_an_engine_of_arrays_is_refused_as_that(protocol):
    with pytest.raises(
        qkit.BackendError, match=r"'numpy' cannot .+: it works on arrays only; choose torchao, .+, or mlx, .+"
    ):
        require(qkit.backend("numpy"), protocol)


def test_nothing_else_in_the_core_asks_an_engine_for_its_verbs():
    asks = re.compile(r"(hasattr|isinstance)\((self\.)?(engine|backend|candidate)\b|runtime_checkable")
    found = [file.name for file in CORE.rglob("*.py") if asks.search(file.read_text(encoding="utf-8"))]
    assert sorted(found) == ["abilities.py", "encoded.py"]  # the latter asks forms of files


@pytest.mark.parametrize("key", WITH_KEY)
def test_a_key_that_an_engine_does_not_declare_is_refused_by_name(key):
    says = rf"cannot prepare: backend 'few' does not honour {key} = '.+' of the rule for \*; use a recipe without it"
    engine = Few()
    engine.recipe_keys = frozenset(WITH_KEY) - {key}
    with pytest.raises(qkit.BackendError, match=says):
        want_honored(engine, [WITH_KEY[key]], "prepare")
    engine.recipe_keys = frozenset(WITH_KEY)
    want_honored(engine, [WITH_KEY[key]], "prepare")


def test_an_engine_that_declares_nothing_honours_weights_only():
    want_honored(Few(), [Rule(("*",), weight=WEIGHT, indivisible="skip"), Rule(("*",), kind="embedding")], "prepare")
    for key, rule in WITH_KEY.items():
        with pytest.raises(qkit.BackendError, match=f"does not honour {'activation' if key == 'range' else key} = "):
            want_honored(Few(), [rule], "prepare")


@pytest.mark.skipif("torchao" not in READY, reason="needs torch")
class TestOlder:
    """An engine from before a key: models are refused before anything in them changes, and artifacts before they are opened."""

    @pytest.fixture
    def older(self):
        return type("Older", (type(qkit.backend("torchao")),), {"name": "older", "recipe_keys": frozenset()})()

    @pytest.fixture
    def model(self):
        from torch import nn

        return nn.Sequential(nn.Linear(64, 32))

    @pytest.mark.parametrize("key", WITH_KEY)
    def test_prepare_and_convert_refuse_the_key(self, older, model, key):
        for verb, call in (("prepare", qkit.prepare), ("convert", qkit.convert)):
            with pytest.raises(qkit.BackendError, match=f"cannot {verb}: backend 'older' does not honour"):
                call(model, Recipe("new", (WITH_KEY[key],)), backend=older)
        assert {layer.stage for layer in older.layers(model)} == {"float"}

    def test_load_refuses_activations_and_opens_learned_scales(self, older, model, tmp_path):
        import copy

        for key in ("activation", "scales"):
            trained = qkit.prepare(copy.deepcopy(model), Recipe("new", (WITH_KEY[key],)))
            qkit.save(qkit.convert(trained), tmp_path / key)
        with pytest.raises(qkit.BackendError, match=r"cannot load .*: backend 'older' does not honour activation = "):
            qkit.load(tmp_path / "activation", into=model, backend=older)
        opened = qkit.load(tmp_path / "scales", into=model, backend=older)
        assert {layer.stage for layer in older.layers(opened)} == {"converted"}


def test_recipe_keys_that_are_text_are_refused():
    engine = Few()
    engine.recipe_keys = "scales ste"  # in which "scales" is found, too
    with pytest.raises(qkit.BackendError, match="recipe_keys = 'scales ste': want a frozenset of names"):
        want_honored(engine, [WITH_KEY["scales"]], "prepare")


def test_docstrings_that_refer_to_a_verb_name_its_protocol():
    refers = re.compile(r"[Ss]ee `(?:qkit\.engines\.protocol\.)?([A-Z]\w+)\.(\w+)`")
    texts = [file.read_text(encoding="utf-8") for file in (CORE.parent / "backends").rglob("*.py")]
    own = set(
        re.findall(r"^class (\w+)", "\n".join(texts), flags=re.MULTILINE)
    )  # an engine refers to its own classes, too
    found = {reference for text in texts for reference in refers.findall(text) if reference[0] not in own}
    assert len(found) > 25
    assert not [
        one
        for one in found
        if not any(
            hasattr(getattr(home, one[0], None), one[1])
            for home in (blocks, protocol, solving, translation, mixtures, norms, tuning)
        )
    ]
