"""Rows of data in the forms of TRL and mlx-lm: which tokens are learned, packing, and layouts on disk."""

import json
import warnings

import numpy as np
import pytest
from models import make
from runs import folder, losses, table
from tables import TRAINERS as ENGINES

import qkit
from qkit.artifact.config import read_config
from qkit.errors import CutWarning
from qkit.training import run_from_table, train_model
from qkit.training.data import padded, sequences
from qkit.training.text import read_text

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

TURNS = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
TEMPLATE = TURNS + "{% if add_generation_prompt %}<assistant>{% endif %}"
ASKED = [{"role": "user", "content": "2?"}]
ANSWER = [{"role": "assistant", "content": "four"}]
MORE = [*ASKED, *ANSWER, {"role": "user", "content": "3?"}, {"role": "assistant", "content": "nine"}]
WHOLE = "<user>2?\n<assistant>four\n<user>3?\n<assistant>nine\n"


@pytest.fixture
def model(tmp_path):
    make(tmp_path / "model", "llama")
    (tmp_path / "model/chat_template.jinja").write_text(TEMPLATE)
    return tmp_path / "model"


def jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(model, data, **options):
    """The text that is trained on, and the part of it that is learned."""
    found = read_text([str(data)], folder=model, config=read_config(model), **options)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    learned = found.tokens if found.learned is None else found.tokens[found.learned]
    return tokenizer.decode(found.tokens), tokenizer.decode(learned)


@pytest.mark.parametrize(
    ("row", "options", "whole", "learned"),
    [
        ({"prompt": "2? ", "completion": "four"}, {"loss_on": None}, "2? four", "four"),
        ({"prompt": "2? ", "completion": "four"}, {"loss_on": "all"}, "2? four", "2? four"),
        ({"prompt": "2?", "completion": "four"}, {"loss_on": None, "chat": True}, "<user>2?\n<assistant>four\n", "four\n"),
        ({"prompt": ASKED, "completion": ANSWER}, {"loss_on": None}, "<user>2?\n<assistant>four\n", "four\n"),
        ({"prompt": MORE[:3], "completion": MORE[3:]}, {"loss_on": None}, WHOLE, "nine\n"),
        ({"messages": MORE}, {"loss_on": "completions"}, WHOLE, "four\nnine\n"),
        ({"messages": MORE}, {"loss_on": None}, WHOLE, WHOLE),
        (
            {"conversations": [{"from": "human", "value": "2?"}, {"from": "gpt", "value": "four"}]},
            {"loss_on": "completions"},
            "<user>2?\n<assistant>four\n",
            "four\n",
        ),
    ],
)  # fmt: skip
def test_completions_are_learned_alone_by_choice(tmp_path, model, row, options, whole, learned):
    assert read(model, jsonl(tmp_path / "rows.jsonl", [row]), **options) == (whole, learned)


def test_the_end_of_a_text_is_learned_where_the_tokenizer_names_it(tmp_path, model):
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(7)
    tokenizer.save_pretrained(model)
    end = tokenizer.decode([7])
    rows = [{"prompt": "2? ", "completion": "four"}]
    assert read(model, jsonl(tmp_path / "rows.jsonl", rows), loss_on=None) == (f"2? four{end}", f"four{end}")
    assert read(model, jsonl(tmp_path / "text.jsonl", [{"text": "one"}]))[0] == f"one{end}"


def test_bytes_have_the_places_of_their_characters(tmp_path):
    rows = jsonl(tmp_path / "rows.jsonl", [{"prompt": "é? ", "completion": "ß"}])
    found = read_text([str(rows)], folder=tmp_path, config={"vocab_size": 256}, loss_on=None)
    assert found.tokens[found.learned].tobytes() == np.frombuffer("ß".encode(), np.uint8).astype(np.int32).tobytes()


@pytest.mark.parametrize("layout", ["parquet", "csv", "hub", "splits", "saved", "saved splits"])
def test_tables_and_hub_layouts_on_disk(tmp_path, model, layout):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list([{"prompt": "2? ", "completion": "four"}] * 2)
    other = datasets.Dataset.from_list([{"prompt": "3? ", "completion": "nine"}])
    place = tmp_path / "data"
    place.mkdir()
    if layout == "parquet":
        rows.to_parquet(place := place / "rows.parquet")
    elif layout == "csv":
        rows.to_csv(place := place / "rows.csv", index=False)
    elif layout == "hub":
        (place / "data").mkdir()
        rows.to_parquet(place / "data/train-00000-of-00001.parquet")
        other.to_parquet(place / "data/test-00000-of-00001.parquet")
    elif layout == "splits":  # as mlx-lm has them
        rows.to_json(place / "train.jsonl")
        other.to_json(place / "valid.jsonl")
    elif layout == "saved":
        rows.save_to_disk(place)
    else:
        datasets.DatasetDict({"train": rows, "test": other}).save_to_disk(place)
    assert read(model, place, loss_on=None) == ("2? four2? four", "fourfour")
    held_out = "nine" if layout in ("hub", "splits", "saved splits") else "fourfour"
    assert read(model, place, loss_on=None, purpose="held_out")[1] == held_out


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([{"prompt": "2?", "completion": ""}], {}, "row 1 of .* has an empty completion"),
        ([{"prompt": ASKED, "completion": []}], {}, "row 1 of .* has an empty completion"),
        ([{"messages": ASKED}], {"loss_on": "completions"}, "row 1 of .* has no answer of the role 'assistant'"),
        ([{"prompt": [{"content": "x"}], "completion": ANSWER}], {}, "row 1 of .* a message without a role"),
        ([{"prompt": 3, "completion": "x"}], {}, "prompt is 3: want texts"),
        ([{"text": "x"}], {"loss_on": "completions"}, "has rows of text without completions"),
    ],
)
def test_rows_with_nothing_to_learn_are_refused_by_name(tmp_path, model, rows, options, message):
    with pytest.raises(qkit.RunError, match=message):
        read(model, jsonl(tmp_path / "rows.jsonl", rows), **{"loss_on": None, **options})


def test_a_template_that_writes_turns_otherwise_in_the_whole_is_refused(tmp_path, model):
    (model / "chat_template.jinja").write_text("{{ messages|length }}" + TEMPLATE)
    with pytest.raises(qkit.RunError, match=r"conversation 1: message 2 is written otherwise.*train on all of it"):
        read(model, jsonl(tmp_path / "rows.jsonl", [{"messages": MORE}]), loss_on="completions")


def test_a_template_that_the_tokenizer_lacks_is_refused_before_the_first_step(tmp_path, model):
    (model / "chat_template.jinja").unlink()
    jsonl(tmp_path / "rows.jsonl", [{"messages": MORE}])
    run = table(tmp_path, data=[str(tmp_path / "rows.jsonl")], backend=ENGINES[0])
    with pytest.raises(qkit.RunError, match=r"put a chat_template\.jinja there"):
        train_model(run_from_table(run))
    assert not (tmp_path / "out.run").exists()


def test_rows_without_packing_do_not_see_each_other():
    tokens, ends = np.arange(1, 10, dtype=np.int32), np.array([2, 5, 9])
    data = padded(tokens, ends, length=3, name="rows")
    assert data.all[:, :-1].tolist() == [[1, 2, 0], [3, 4, 5], [6, 7, 8]]
    assert data.mask(data.chosen).tolist() == [[True, False, False], [True, True, False], [True, True, False]]


def test_sequences_that_learn_nothing_are_left_out_and_all_of_them_are_refused():
    tokens, learned = np.arange(13, dtype=np.int32), np.zeros(13, np.bool_)
    learned[6] = True
    assert sequences(tokens, length=4, name="rows", learned=learned).chosen.tolist() == [1]
    with pytest.raises(qkit.RunError, match="rows has no token to learn within sequences of 4"):
        padded(tokens, np.array([13]), length=4, name="rows", learned=learned)


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("packing", [True, False])
def test_a_run_learns_completions_alone(tmp_path, name, packing):
    """Its first loss is that of the reference: the mean over the tokens of completions, and no others."""
    path = folder(tmp_path, name)
    rows = [{"prompt": f"{i} squared is ", "completion": f"{i * i}; "} for i in range(1, 41)]
    jsonl(path / "rows.jsonl", rows)
    made = table(path, data=[str(path / "rows.jsonl")], backend=name, packing=packing, length=32, steps=2)
    outcome = train_model(run_from_table({**made, "batch": 40 if not packing else 2, "held_out": made["data"]}))
    model = qkit.convert(qkit.load(path / "model", backend=name), "int4-g32")
    assert outcome.held_out_after < outcome.held_out_before
    if packing:
        return
    whole = [(row["prompt"] + row["completion"]).encode() for row in rows]
    nats = count = 0.0
    for row, text in zip(rows, whole, strict=True):
        logits = qkit.backend(name).logits(model, np.frombuffer(text, np.uint8)[None].astype(np.int32))[0]
        rates = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        places = range(len(row["prompt"]), len(text))
        nats, count = nats - sum(rates[i - 1, text[i]] for i in places), count + len(places)
    assert losses(path / "out")[0] == pytest.approx(nats / count, rel=1e-5)  # another order of sums
    assert outcome.held_out_before == pytest.approx(nats / count, rel=1e-5)  # the same


def test_a_run_warns_of_rows_that_lose_their_ends(tmp_path):
    path = folder(tmp_path)
    jsonl(
        path / "rows.jsonl", [{"prompt": "2? ", "completion": "four"}] * 8 + [{"prompt": "9" * 40, "completion": "x"}]
    )
    made = table(path, data=[str(path / "rows.jsonl")], packing=False, steps=1)
    with pytest.warns(CutWarning, match=r"1 of 9 rows .* longer than length 16 .*; 1 of them lose all that is learned"):
        train_model(run_from_table(made))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train_model(run_from_table({**made, "length": 64, "out": str(path / "other")}))
