"""A run from directory to artifact: its inputs, its files, and its refusals."""

import json
from dataclasses import replace

import numpy as np
import pytest
from models import small
from runs import folder, table
from safetensors.numpy import load_file, save_file
from tables import TRAINERS as ENGINES

import qkit
from qkit import reference
from qkit.exchange.import_model import read_model
from qkit.formats.packed import unpack
from qkit.training import run_from_table, teach, train_model
from qkit.training.data import sequences, split
from qkit.training.folder import LOG, read_log, run_folder_of
from qkit.training.model import build_float_model
from qkit.training.teacher import KEY, write_top
from qkit.training.text import read_text

pytestmark = pytest.mark.skipif(not ENGINES, reason="needs an engine that trains")
FLOAT_HEAD = {"lm_head", "model.embed_tokens"}


def train(path, **changes):
    return train_model(run_from_table(table(path, **changes)))


def config(path, **changes):
    file = path / "model" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize("name", ENGINES)
def test_training_lowers_the_loss_and_what_is_saved_is_what_was_trained(tmp_path, name):
    path = folder(tmp_path)
    (path / "model" / "tokenizer_config.json").write_text("{}")
    outcome = train(path, backend=name, steps=30, evaluate_every=10)
    assert outcome.held_out_after < outcome.held_out_before - 0.1
    assert outcome.last_loss < outcome.first_loss
    assert outcome.held_out_saved == pytest.approx(outcome.held_out_after, rel=1e-6)
    assert outcome.forward_difference == 0.0
    assert (outcome.steps, outcome.tokens) == (30, 30 * 2 * 16)
    events = read_log(run_folder_of(path / "out") / LOG)
    assert [e["step"] for e in events if e["event"] == "evaluation"] == [0, 10, 20, 30]
    assert [e["step"] for e in events if e["event"] == "step"] == list(range(1, 31))
    assert {entry.name for entry in (path / "out").iterdir()} >= {
        "config.json",
        "model.safetensors",
        "tokenizer_config.json",
    }
    left = [row for row in qkit.coverage(qkit.load(path / "out", backend=name)).rows if not row.weight]
    assert {row.path for row in left} == FLOAT_HEAD


@pytest.mark.parametrize("name", ENGINES)
def test_a_bfloat16_model_is_trained_in_float32_and_saved_as_it_was(tmp_path, name):
    path = folder(tmp_path, dtype="bfloat16")
    outcome = train(path, backend=name, steps=3)
    assert json.loads((path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    tensors = load_file(path / "out" / "model.safetensors")
    assert {str(array.dtype) for array in tensors.values()} == {"bfloat16", "int32", "int64"}
    trained = load_file(sorted(run_folder_of(path / "out").glob("checkpoint*"))[-1])[
        "weights.model.layers.0.mlp.up_proj.weight"
    ]
    q = qkit.quantize(trained, qkit.Grid("int4", 32))
    opened = qkit.load(path / "out", backend=name)
    layer = next(one for one in qkit.backend(name).layers(opened) if one.path == "model.layers.0.mlp.up_proj")
    held = qkit.backend(name).unpack(layer.module)
    assert (qkit.backend(name).to_numpy(held.codes) == q.codes).all()
    assert held.dtype == "bfloat16"
    assert outcome.held_out_saved == pytest.approx(outcome.held_out_after, rel=2e-2)  # bfloat16 products


@pytest.mark.filterwarnings("ignore:training changed no code")  # of eight bits in two steps
@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("tied", [False, True])
def test_training_goes_on_from_an_artifact_on_its_own_grids(tmp_path, name, tied):
    path = folder(tmp_path, tie_word_embeddings=tied)
    recipe = "int4-g32-all" if tied else "int3-g32"
    model = qkit.convert(qkit.load(path / "model", backend=name), recipe)
    before = qkit.backend(name).loss(model, split_rows(path))
    qkit.save(model, path / "ptq", source=path / "model")
    outcome = train(path, backend=name, model=str(path / "ptq"), recipe=None, steps=20)
    assert outcome.held_out_before == pytest.approx(before, rel=1e-6)  # the grids are their values' own
    assert outcome.held_out_after < before
    models = (qkit.load(path / "out", backend=name), model)
    found, want = ([(row.path, row.weight) for row in qkit.coverage(one).rows] for one in models)
    assert found == want
    other = train(path, backend=name, model=str(path / "ptq"), recipe="int8-g32", steps=2, out=str(path / "other"))
    assert other.steps == 2


def split_rows(path):
    text = read_text([str(path / "text.txt")], folder=path / "model", config={"vocab_size": 256})
    return split(sequences(text.tokens, length=16, name=""))[1].all


@pytest.mark.parametrize("name", ENGINES)
def test_float_training_is_asked_for_by_name(tmp_path, name):
    path = folder(tmp_path)
    with pytest.raises(qkit.RunError, match="is a float model: name a recipe, or 'float' to train without one"):
        train(path, backend=name, recipe=None)
    outcome = train(path, backend=name, recipe="float", steps=5)
    assert outcome.forward_difference is None
    assert {row.weight for row in qkit.coverage(qkit.load(path / "out", backend=name)).rows} == {""}


@pytest.mark.parametrize("name", ENGINES)
def test_calibrated_ranges_are_found_in_the_data_before_the_first_step(tmp_path, name):
    outcome = train(folder(tmp_path), backend=name, recipe="int8-static-act-int8-weight", steps=3)
    assert outcome.held_out_saved == pytest.approx(outcome.held_out_after, rel=1e-6)


@pytest.mark.parametrize("name", ENGINES)
def test_held_out_losses_are_of_the_quantized_model_though_training_does_not_quantize_yet(tmp_path, name):
    path = folder(tmp_path)
    late = train(path, backend=name, recipe="int2-g32", quantization={"start": 100})
    plain = train(path, backend=name, recipe="int2-g32", out=str(path / "plain"))
    assert late.held_out_before == plain.held_out_before
    assert late.held_out_saved == pytest.approx(late.held_out_after, rel=1e-6)
    assert late.last_loss != plain.last_loss


def test_without_steps_a_run_is_once_over_the_data(tmp_path):
    path = folder(tmp_path)
    outcome = train(path, steps=None, length=64, held_out=[str(path / "text.txt")])
    count = (len((path / "text.txt").read_bytes()) - 1) // 64
    assert outcome.steps == count // 2


@pytest.mark.parametrize("name", ENGINES)
def test_a_teacher_and_the_file_of_its_logits_teach_the_same(tmp_path, name):
    path = folder(tmp_path)
    qkit.save(small(name, rms_norm_eps=0.5), path / "teacher", backend=name)
    run = table(path, backend=name, distillation={"teacher": str(path / "teacher")})
    teach(run_from_table(run), path / "top.safetensors", top=256)
    runs = {}
    for kind in ("teacher", "top.safetensors", ""):
        told = {"distillation": {"teacher": str(path / kind), "weight": 0.9}} if kind else {}
        train(path, backend=name, **told, out=str(path / f"out{kind}"), steps=4, learning_rate=1e-4)
        runs[kind] = [e["loss"] for e in read_log(run_folder_of(path / f"out{kind}") / LOG) if e["event"] == "step"]
    assert runs["teacher"] == pytest.approx(runs["top.safetensors"], rel=1e-5)
    assert runs["teacher"] != pytest.approx(runs[""], rel=1e-2)


def test_a_file_of_logits_of_another_text_is_refused(tmp_path):
    path, engine = folder(tmp_path), qkit.backend(ENGINES[0])
    data = sequences(np.zeros(33, np.int32), length=16, name="")
    write_top(engine, qkit.load(path / "model", backend=engine), data, path / "top.safetensors", k=2)
    with pytest.raises(qkit.RunError, match=r"top\.safetensors is of another text"):
        train(path, distillation={"teacher": str(path / "top.safetensors")})
    with pytest.raises(qkit.ArtifactError, match="is no file of a teacher's logits"):
        train(path, distillation={"teacher": str(path / "model" / "model.safetensors")})
    with pytest.raises(qkit.RunError, match=r"distillation\.teacher is not there: name the directory"):
        teach(run_from_table(table(path)), path / "more.safetensors", top=2)
    own = split(
        sequences(
            read_text([str(path / "text.txt")], folder=path, config={"vocab_size": 256}).tokens, length=16, name=""
        )
    )
    wider = {
        "logits": np.zeros((len(own[0]), 16, 1), np.float32),
        "tokens": np.full((len(own[0]), 16, 1), 256, np.int32),
    }
    save_file(wider, path / "wider.safetensors", metadata={KEY: own[0].digest()})
    with pytest.raises(qkit.RunError, match="has logits of token 256, and the model a vocabulary of 256"):
        train(path, distillation={"teacher": str(path / "wider.safetensors")})
    with pytest.raises(qkit.RunError, match="top is 300: the teacher has 256 logits"):
        write_top(engine, qkit.load(path / "model", backend=engine), data, path / "more.safetensors", k=300)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"length": 200}, qkit.RunError, "length is 200, and the model has positions for 128"),
        ({"adapter": {"match": "none"}}, qkit.StageError, "no layer matches none"),
        ({"adapter": {"rank": 99}}, qkit.QkitError, "rank 99 is more than its weight"),
        ({"recipe": "int4-g33"}, qkit.RecipeError, "unknown recipe 'int4-g33'"),
        ({"backend": "numpy"}, qkit.BackendError, "'numpy' cannot train"),
        ({"model": "/nowhere"}, qkit.QkitError, "/nowhere is no directory"),
        ({"data": "/nowhere/*.txt"}, qkit.RunError, "stands for no file"),
        ({"device": "abacus"}, qkit.BackendError, "abacus"),
    ],
)
def test_what_does_not_fit_is_refused_and_leaves_nothing(tmp_path, changes, error, message):
    path = folder(tmp_path)
    with pytest.raises(error, match=message):
        train(path, **changes)
    assert {entry.name for entry in path.iterdir()} == {"model", "text.txt"}


def words(size):
    """A tokenizer.json of so many words, w0 and so on."""
    model = {"type": "WordLevel", "vocab": {f"w{i}": i for i in range(size)}, "unk_token": "w0"}
    whole = {"version": "1.0", "added_tokens": [], "pre_tokenizer": {"type": "Whitespace"}, "model": model}
    return json.dumps(whole | dict.fromkeys(("truncation", "padding", "normalizer", "post_processor", "decoder")))


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ({"text.txt": "short"}, r"text\.txt has 5 tokens, less than one sequence of 17: give more text, or a shorter"),
        ({"text.txt": ""}, r"text\.txt is empty: leave it out, or fill it"),
        ({"model/tokenizer.model": "x"}, r"tokenizer\.model is no tokenizer that qkit opens: let transformers save it"),
        ({"model/tokenizer.json": "{}"}, r"tokenizer\.json: not a tokenizer that tokenizers opens"),
        (
            {"model/tokenizer.json": words(300), "text.txt": "w1 w299 " * 99},
            r"the text has token 299, and the model a vocabulary of 256: put the tokenizer",
        ),
    ],
    ids=["short", "empty", "unknown tokenizer", "broken tokenizer", "vocabulary"],
)
@pytest.mark.parametrize("name", ENGINES)
def test_text_that_cannot_be_trained_on_is_refused_and_leaves_nothing(tmp_path, name, texts, message):
    pytest.importorskip("tokenizers")
    path = folder(tmp_path)
    for file, content in texts.items():
        (path / file).write_text(content)
    before = sorted(path.rglob("*"))
    with pytest.raises(qkit.RunError, match=message):
        train(path, backend=name)
    assert sorted(path.rglob("*")) == before


def test_a_teacher_with_another_vocabulary_is_refused(tmp_path):
    path = folder(tmp_path)
    qkit.save(small(ENGINES[0], vocab_size=258), path / "teacher", backend=ENGINES[0])
    with pytest.raises(qkit.RunError, match=r"teacher has a vocabulary of 258, and .*model one of 256"):
        train(path, distillation={"teacher": str(path / "teacher")})


def test_nothing_is_overwritten_unless_it_is_asked_for(tmp_path):
    path = folder(tmp_path)
    train(path, steps=2)
    old = (path / "out" / "model.safetensors").read_bytes()
    with pytest.raises(qkit.ArtifactError, match=r"out holds a model already: .*replace = true"):
        train(path, steps=2)
    with pytest.raises(qkit.RunError, match="steps = 2, and now it is 3"):
        train(path, steps=3, replace=True)
    assert train(path, steps=2, replace=True).steps == 2
    assert (path / "out" / "model.safetensors").read_bytes() == old
    (path / "mine").mkdir()
    (path / "mine" / "letter.txt").write_text("x")
    with pytest.raises(qkit.ArtifactError, match="mine holds a model that qkit did not write"):
        train(path, out=str(path / "mine"), replace=True)


def test_a_model_with_no_configuration_is_refused_by_name(tmp_path):
    path = folder(tmp_path)
    (path / "model" / "config.json").unlink()
    (path / "model" / "qkit.json").unlink()  # or it would say that the file is missing
    with pytest.raises(qkit.RunError, match=r"has no config\.json"):
        train(path)


@pytest.mark.parametrize("name", ENGINES)
def test_masters_of_a_bfloat16_artifact_are_the_exact_values_of_its_codes(tmp_path, name):
    """In float32; the model itself would give them back in bfloat16, which moves them off the grid."""
    path, engine = folder(tmp_path, dtype="bfloat16"), qkit.backend(name)
    qkit.save(qkit.convert(qkit.load(path / "model", backend=name), "int8-g32"), path / "ptq", source=path / "model")
    source = read_model(path / "ptq")
    model = build_float_model(engine, source, dtype="float32")
    weights = {layer.path: engine.to_numpy(engine.weight(layer.module)) for layer in engine.layers(model)}
    for key, held in source.weights.items():
        q = unpack(held.read())
        assert (weights[key] == reference.dequantize(replace(q, dtype="float32"))).all()
        assert (weights[key] != reference.dequantize(q).astype(np.float32)).any()


@pytest.mark.parametrize("name", ENGINES)
def test_a_run_with_less_memory_is_the_same_run(tmp_path, name):
    path = folder(tmp_path)
    plain = train(path, backend=name, steps=4, out=str(path / "plain"))
    sparing = train(path, backend=name, steps=4, gradient_checkpointing=True)
    assert sparing.held_out_saved == pytest.approx(plain.held_out_saved, rel=1e-5)  # MLX sums in another order
    assert sparing.forward_difference == 0.0
