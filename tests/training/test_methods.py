"""`--method sft`, `dpo` and `orpo`: TRL on torch and mlx-lm-lora on MLX train the prepared model, and qkit ships it exactly."""

import json
from importlib.util import find_spec

import numpy as np
import pytest
from alike import contents
from models import TOKENS, make
from typer.testing import CliRunner

import qkit
from qkit.artifact.config import read_config
from qkit.cli.application import application
from qkit.training import run_from_table, train_model
from qkit.training.folder import LOG, read_log, run_folder_of
from qkit.training.text import read_text

LIBRARY = {"torchao": "trl", "mlx": "mlx_lm_lora"}
TURNS = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
TEMPLATE = TURNS + "{% if add_generation_prompt %}<assistant>{% endif %}"
METHODS = ["sft", "dpo", "orpo"]
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{text}")  # of libraries, not of qkit
    for text in (".*pin_memory:UserWarning", ".*:FutureWarning", ".*:DeprecationWarning", ".*use_reentrant:UserWarning")
]
needs = {
    name: pytest.mark.skipif(not find_spec(library), reason=f"{library} is not installed")
    for name, library in LIBRARY.items()
}
ENGINES = [pytest.param(name, marks=needs[name]) for name in LIBRARY]


def model(path):
    make(path / "model", "llama")
    (path / "model/chat_template.jinja").write_text(TEMPLATE)
    known = json.loads((path / "model/tokenizer_config.json").read_text())
    words = json.loads((path / "model/tokenizer.json").read_text())["model"]["vocab"]
    (path / "model/tokenizer_config.json").write_text(json.dumps({**known, "eos_token": next(iter(words))}))
    return path


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def rows_of(method):
    if method == "sft":
        return [{"prompt": f"{i}? ", "completion": f"it is {i * i}"} for i in range(8)]
    return [{"prompt": f"{i}? ", "chosen": f"it is {i * i}", "rejected": f"no {i}"} for i in range(8)]


def table(path, method, name, **changes):
    made = {
        "model": str(path / "model"), "out": str(path / "out"), "data": [jsonl(path / "rows.jsonl", rows_of(method))],
        "recipe": "int4-g32", "backend": name, "method": method, "steps": 3, "batch": 2, "length": 32,
        "learning_rate": 5e-3, "packing": False,
    }  # fmt: skip
    return {key: value for key, value in {**made, **changes}.items() if value is not None}


def losses(out):
    return [event["loss"] for event in read_log(run_folder_of(out) / LOG) if event["event"] == "step"]


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("method", METHODS)
def test_a_method_trains_on_the_grid_and_ships_the_last_weights_exactly(tmp_path, monkeypatch, method, name):
    path, engine, seen = model(tmp_path), qkit.backend(name), {}
    plain = train_model(run_from_table(table(path, method, name, recipe="float", out=str(path / "float"))))
    convert = qkit.pipeline.convert

    def watched(model, *arguments, **options):
        seen["codes"] = {
            one.path: qkit.quantize(engine.to_numpy(engine.weight(one.module)), one.rule.weight).codes
            for one in engine.layers(model)
            if one.stage == "prepared"
        }
        return convert(model, *arguments, **options)

    monkeypatch.setattr(qkit.pipeline, "convert", watched)
    outcome = train_model(run_from_table(table(path, method, name)))
    assert losses(path / "out") != losses(path / "float")
    assert (outcome.steps, plain.steps) == (3, 3)
    assert outcome.changed_layers == outcome.quantized_layers == len(seen["codes"]) == 14
    assert outcome.forward_difference == 0
    opened = qkit.load(path / "out", backend=name)
    found = {one.path: one.module for one in engine.layers(opened) if one.stage == "converted"}
    assert found.keys() == seen["codes"].keys()
    assert sum((engine.to_numpy(engine.unpack(found[key]).codes) != x).sum() for key, x in seen["codes"].items()) == 0
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    with torch.no_grad():
        theirs = transformers.AutoModelForCausalLM.from_pretrained(path / "out")(torch.from_numpy(TOKENS).long()).logits
    np.testing.assert_allclose(theirs, engine.logits(opened, TOKENS), atol=1e-3)  # its kernels


@pytest.mark.parametrize("name", ENGINES)
def test_both_libraries_take_conversations_and_schedules_that_they_can_follow(tmp_path, name):
    path = model(tmp_path)
    talks = [
        {
            "chosen": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": f"it is {i * i}"}],
            "rejected": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": "no"}],
        }
        for i in range(4)
    ]
    run = table(path, "dpo", name, data=[jsonl(path / "talks.jsonl", talks)], quantization={"start": 2})
    outcome = train_model(run_from_table({**run, "adapter": {"rank": 4}}))
    assert outcome.forward_difference == 0
    assert losses(path / "out")[0] == pytest.approx(np.log(2), rel=0.2)  # DPO begins where both models agree


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("method", METHODS)
def test_a_schedule_is_followed(tmp_path, method, name):
    """Until its start the losses are those of float training; then they are not."""
    path, short = model(tmp_path), {"recipe": "int2-g32", "steps": 4, "learning_rate": 2e-2}
    train_model(run_from_table(table(path, method, name, **{**short, "recipe": "float"}, out=str(path / "float"))))
    train_model(run_from_table(table(path, method, name, **short, quantization={"start": 3})))
    late, plain = losses(path / "out"), losses(path / "float")
    assert late[:2] == plain[:2]
    assert late[2] != plain[2]


class Killed(Exception):
    """Ends a run from inside, as an interruption would."""


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("end", ["killed", "stopped"])
def test_a_method_that_was_interrupted_goes_on_to_the_same_bytes(tmp_path, method, name, end):
    path, run = model(tmp_path), {"steps": 5, "checkpoint_every": 2, "schedule": "linear", "accumulation": 1}
    if end == "stopped":
        run |= {"adapter": {"rank": 4}, "checkpoint_every": 50}
    train_model(run_from_table(table(path, method, name, **run, out=str(path / "whole"))))
    seen, asked = [], []

    def tell(event):
        seen.append((event["event"], event["step"]))
        if end == "killed" and seen[-1] == ("step", 3):
            raise Killed

    with pytest.raises(Killed if end == "killed" else KeyboardInterrupt):
        train_model(
            run_from_table(table(path, method, name, **run)), tell=tell, stop=lambda: asked.append(1) or asked[2:] != []
        )
    assert not (path / "out").exists()
    assert [step for kind, step in seen if kind == "checkpoint"] == [2 if end == "killed" else 3]
    outcome = train_model(
        run_from_table(table(path, method, name, **run)), tell=tell if end == "stopped" else lambda _: None
    )
    assert outcome.steps == 5
    assert losses(path / "out") == losses(path / "whole")
    assert contents(path / "out") == contents(path / "whole")
    kinds = [event["event"] for event in read_log(run_folder_of(path / "out") / LOG)]
    assert kinds.count("resume") == 1
    assert kinds[-1] == "end"
    assert not (run_folder_of(path / "out") / "library").exists()


def evaluations(out):
    return [(one["step"], one["loss"]) for one in read_log(run_folder_of(out) / LOG) if one["event"] == "evaluation"]


@needs["torchao"]
@pytest.mark.parametrize("more", [{}, {"adapter": {"rank": 4}}, {"quantization": {"start": 3}}], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_the_artifact_of_a_method_has_the_best_evaluation(tmp_path, method, more):
    """At this rate the loss on rows that are not learned soon rises; a run of the best step's length has the same codes."""
    path = model(tmp_path)
    unseen = [{key: f"{x}?" if key == "prompt" else f"so {x}" for key, x in row.items()} for row in rows_of(method)]
    held = {"held_out": [jsonl(path / "unseen.jsonl", unseen)], "evaluate_every": 1, "load_best_model_at_end": True}
    run = table(path, method, "torchao", **held, steps=6, learning_rate=5e-2, schedule="constant", **more)
    outcome = train_model(run_from_table(run))
    seen = evaluations(path / "out")
    assert [step for step, _ in seen] == [1, 2, 3, 4, 5, 6]
    assert outcome.best_step == min(seen, key=lambda one: one[1])[0]
    short = {key: x for key, x in run.items() if key not in held}
    train_model(run_from_table({**short, "steps": outcome.best_step, "out": str(path / "short")}))
    engine = qkit.backend("torchao")
    best, other = (qkit.load(path / name, backend="torchao") for name in ("out", "short"))
    assert np.array_equal(engine.logits(best, TOKENS), engine.logits(other, TOKENS))
    patient = {**run, "early_stopping_patience": 1, "early_stopping_threshold": 10.0, "out": str(path / "early")}
    early = train_model(run_from_table(patient))
    assert early.steps == 2  # the first improves on nothing, the second not by 10 nats
    kinds = [event["event"] for event in read_log(run_folder_of(path / "early") / LOG)]
    assert kinds[-2:] == ["early_stop", "end"]


@needs["torchao"]
def test_an_interrupted_method_ships_the_same_best_evaluation(tmp_path):
    path = model(tmp_path)
    held = {"held_out": [jsonl(path / "unseen.jsonl", rows_of("sft")[:2])], "evaluate_every": 2}
    run = table(path, "sft", "torchao", **held, load_best_model_at_end=True, steps=6, learning_rate=2e-2)
    train_model(run_from_table({**run, "out": str(path / "whole")}))
    asked = []
    with pytest.raises(KeyboardInterrupt):
        train_model(run_from_table(run), stop=lambda: asked.append(1) or asked[2:] != [])
    train_model(run_from_table(run))
    assert evaluations(path / "out") == evaluations(path / "whole")
    assert contents(path / "out") == contents(path / "whole")


@needs["mlx"]
def test_a_best_evaluation_under_a_method_is_refused_on_mlx(tmp_path):
    path = model(tmp_path)
    held = {"held_out": [jsonl(path / "unseen.jsonl", rows_of("sft"))], "evaluate_every": 2}
    with pytest.raises(qkit.BackendError, match="mlx-lm-lora has no best checkpoint and no early stopping"):
        train_model(run_from_table(table(path, "sft", "mlx", **held, load_best_model_at_end=True)))
    assert not (path / "out").exists()


@needs["torchao"]
def test_the_checkpoint_of_another_run_is_refused_by_name(tmp_path):
    path = model(tmp_path)
    run = table(path, "sft", "torchao", steps=9)
    with pytest.raises(KeyboardInterrupt):
        train_model(run_from_table(run), stop=lambda: True)
    for changes, message in (
        ({"recipe": "int2-g32"}, "is of the recipe 'int4-g32', and this run is for 'int2-g32'"),
        ({"learning_rate": 1e-4}, "is of a run with learning_rate = 0.005, and now it is 0.0001"),
        ({"data": [jsonl(path / "others.jsonl", rows_of("sft")[1:])]}, "is of another text"),
    ):
        with pytest.raises(qkit.RunError, match=message):
            train_model(run_from_table({**run, **changes}))


@pytest.mark.parametrize("name", ENGINES)
def test_every_turn_of_the_assistant_is_learned_and_nothing_else(tmp_path, name):
    """The first loss of `sft` is the mean over the tokens of all answers, by the reference's logits."""
    path = model(tmp_path)
    talk = [
        {"role": role, "content": text}
        for role, text in (("user", "2?"), ("assistant", "four"), ("user", "and 3?"), ("assistant", "nine"))
    ]
    run = table(path, "sft", name, data=[jsonl(path / "talks.jsonl", [{"messages": talk}] * 2)], steps=1, length=64)
    train_model(run_from_table({**run, "loss_on": "completions"}))
    prepared = qkit.convert(qkit.load(path / "model", backend=name), "int4-g32")
    found = read_text(
        run["data"], folder=path / "model", config=read_config(path / "model"), loss_on="completions", chat=False
    )
    tokens, learned = (np.split(x, found.ends[:-1])[0] for x in (found.tokens, found.learned))
    logits = qkit.backend(name).logits(prepared, tokens[None])[0].astype(np.float64)
    rates = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    nats = [-rates[i - 1, tokens[i]] for i in range(1, len(tokens)) if learned[i]]
    assert 0 < learned.sum() < learned.size
    assert losses(path / "out")[0] == pytest.approx(np.mean(nats), rel=1e-4)  # TRL and MLX log float32 means


def test_on_the_command_line(tmp_path, monkeypatch):
    pytest.importorskip("trl")
    path = model(tmp_path)
    monkeypatch.chdir(path)
    data = jsonl(path / "rows.jsonl", rows_of("orpo"))
    short = ["--steps", "2", "--batch", "2", "--length", "32", "--learning-rate", "5e-3", "--backend", "torchao"]
    done = CliRunner().invoke(
        application, ["train", "model", "out", "-r", "int4-g32", "--method", "orpo", "--data", data, "--json", *short]
    )
    assert done.exit_code == 0, done.output
    assert [json.loads(line)["event"] for line in done.stdout.splitlines()] == ["start", "step", "step", "end"]


@needs["torchao"]
@pytest.mark.parametrize("method", ["dpo", "orpo"])
def test_a_tokenizer_without_an_end_of_text_is_refused_where_trl_needs_one(tmp_path, method):
    make(tmp_path / "model", "llama")
    with pytest.raises(qkit.BackendError, match="names none: name one in tokenizer_config"):
        train_model(run_from_table(table(tmp_path, method, "torchao")))


@pytest.mark.parametrize(
    ("method", "row", "changes", "message"),
    [
        ("dpo", {"prompt": "2?", "chosen": "4"}, {}, "row 1 of .* has no 'rejected'"),
        ("dpo", {"prompt": "2?", "chosen": "4", "rejected": ""}, {}, "row 1 of .* has an empty 'rejected'"),
        ("orpo", {"prompt": "2?", "chosen": "4", "rejected": "4"}, {}, "the same text in chosen and in rejected"),
        ("orpo", {"chosen": "4", "rejected": "5"}, {}, "row 1 of .* has no 'prompt'"),
        ("dpo", {"prompt": "2" * 40, "chosen": "4", "rejected": "5"}, {}, "tokens before its answers, and length is 32"),
        ("sft", {"prompt": "2?", "completion": ""}, {}, "has an empty completion"),
        ("sft", {"prompt": "2" * 40, "completion": "4"}, {}, "no token to learn within length 32"),
        ("sft", {"text": "2?"}, {"distillation": {"teacher": "model"}}, "method = 'sft' takes no teacher"),
        ("ppo", {"text": "2?"}, {}, "method is 'ppo': want one of sft, dpo, orpo"),
        ("dpo", {"prompt": "2?", "chosen": "4", "rejected": "5"}, {}, "fewer than a batch of 2"),
        ("dpo", {"prompt": [{"content": "2?"}], "chosen": "4", "rejected": "5"}, {}, "a message without a role"),
    ],
)  # fmt: skip
def test_what_a_method_cannot_learn_is_refused_by_name_before_the_first_step(tmp_path, method, row, changes, message):
    pytest.importorskip("trl")
    path = model(tmp_path)
    data = [jsonl(path / "bad.jsonl", [row])]
    with pytest.raises(qkit.RunError, match=message):
        train_model(run_from_table({**table(path, method, "torchao"), "data": data, **changes}))
    assert not (path / "out").exists()
