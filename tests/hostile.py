"""Directories of models with one thing wrong, by number: a seeded generator, and what every command has to make of them.

`python tests/hostile.py BEGIN END` runs the cases from BEGIN to END and prints counts as JSON.
"""

import contextlib
import io
import json
import os
import random
import shutil
import signal
import struct
import sys
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from safetensors.numpy import save_file

import qkit
from qkit.artifact.verify import verify
from qkit.cli import main
from qkit.exchange.export_model import export_mlx
from qkit.exchange.import_model import read_model
from qkit.streaming.carry_out import quantize_directory
from qkit.streaming.plan import make_plan

SECONDS = 10  #: for a case; the slowest takes a tenth of one
CODES = {0, 1, 3, 4, 5, 6}
CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 1,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 128,
    "vocab_size": 32,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "dtype": "float32",
}
SHAPES = {
    "model.embed_tokens.weight": (32, 64),
    "model.norm.weight": (64,),
    "lm_head.weight": (32, 64),
    **{f"model.layers.0.self_attn.{name}_proj.weight": (64, 64) for name in "qkvo"},
    **{f"model.layers.0.mlp.{name}_proj.weight": (96, 64) for name in ("up", "gate")},
}
RECIPE = 'schema = 1\n[grids.w]\nelement = "int4"\ngroup = 32\n[[rules]]\nmatch = "*"\nweight = "w"\n'

#: Placeholders for text that the `json` module would not write.
BIG, DEEP, LONG = "@big@", "@deep@", "@long@"
RAW = {f'"{BIG}"': "9" * 5000, f'"{DEEP}"': "[" * 5000 + "]" * 5000, f'"{LONG}"': '"' + "a" * 100_000 + '"'}
VALUES = (
    *(
        None,
        True,
        False,
        0,
        -1,
        1,
        2,
        3,
        7,
        0.5,
        -0.0,
        1e308,
        10**9,
        2**31,
        2**53,
        2**63,
        10**400,
        float("nan"),
        float("inf"),
    ),
    *("", "x", "\0", "../../x", "/etc/passwd", "é", "\ud800", "int4", "e2m1", "int99999", "re:(a+)+$", "Linear", "row"),
    *([], {}, [1], ["x"], [[]], {"x": 1}, {"": None}, [None] * 100, BIG, DEEP, LONG),
)
WORDS = (
    "group",
    "num_bits",
    "quant_method",
    "targets",
    "weights",
    "format",
    "layers",
    "rules",
    "mode",
    "bits",
    "dtype",
)


def make_sound(home):
    """The directories that cases begin from: float, sharded, an artifact, its export for MLX, another tool's."""
    home = Path(home)
    arrays = np.random.default_rng(0)
    tensors = {name: arrays.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}
    for name in ("float", "sharded"):
        (home / name).mkdir()
        (home / name / "config.json").write_text(json.dumps(CONFIG))
    save_file({**tensors, "mask": np.ones(3, bool)}, home / "float/model.safetensors")
    names, places = list(tensors), {}
    for i, part in enumerate((names[:4], names[4:]), start=1):
        shard = f"model-0000{i}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, home / "sharded" / shard)
        places |= dict.fromkeys(part, shard)
    (home / "sharded/model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    plan = make_plan(home / "float", qkit.recipe("int4-g32"))
    quantize_directory(plan, home / "artifact", engine=qkit.backend("numpy"), workers=1, tick=lambda name, done: None)
    export_mlx(read_model(home / "artifact"), home / "mlx")
    shutil.copytree(home / "artifact", home / "foreign")
    (home / "foreign/qkit.json").unlink()
    edit_header(home / "foreign/model.safetensors", lambda table: table.pop("__metadata__"))


def edit_header(file, edit):
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    table = json.loads(data[8 : 8 + length])
    edit(table)
    text = dumped(table)
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def dumped(value):
    text = json.dumps(value)
    for placeholder, raw in RAW.items():
        text = text.replace(placeholder, raw)
    return text.encode()


def mutate(rng, value):
    """`value`, somewhere in it another, one more, or one less."""
    if isinstance(value, (dict, list)) and value and rng.random() < 0.85:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        key = rng.choice(keys)
        what = rng.random()
        if what < 0.1:
            del value[key]
        elif what < 0.2 and isinstance(value, dict):
            value[rng.choice((*WORDS, "", "\0", "../x", "x" * 2000))] = value.pop(key)
        elif what < 0.3 and isinstance(value, dict):
            value[rng.choice(WORDS)] = rng.choice(VALUES)
        else:
            value[key] = mutate(rng, value[key])
        return value
    return rng.choice(VALUES)


def mutate_json(rng, file):
    table = json.loads(file.read_text())
    if rng.random() < 0.6 and isinstance(table, dict):
        key = (
            rng.choice([*CONFIG, "quantization_config", "quantization", "text_config"])
            if file.name == "config.json"
            else ""
        )
        if key in table or (key and rng.random() < 0.5):
            table[key] = mutate(rng, table.get(key))
            file.write_bytes(dumped(table))
            return
    file.write_bytes(dumped(mutate(rng, table)))


def mutate_header(rng, file):
    def edit(table):
        name = rng.choice(list(table))
        if name == "__metadata__" and "qkit" in table[name] and rng.random() < 0.9:
            about = mutate(rng, json.loads(table[name]["qkit"]))
            table[name]["qkit"] = dumped(about).decode()
        elif rng.random() < 0.2:
            table[rng.choice(("", "\0", "a\0b", "../x", "/x", "x" * 5000, "layers.99999999999.x"))] = table.pop(name)
        elif rng.random() < 0.2:
            table["more"] = {
                "dtype": "F32",
                "shape": rng.choice(([0], [0, 2**62, 2**62], [1] * 70, [])),
                "data_offsets": [0, 0],
            }
        else:
            table[name] = mutate(rng, table[name])

    edit_header(file, edit)


def mutate_bytes(rng, file):
    data = bytearray(file.read_bytes())
    what = rng.random()
    if what < 0.2:
        data = data[: rng.randrange(len(data))]
    elif what < 0.3:
        data += bytes(rng.randrange(1, 9))
    elif what < 0.4:
        data[:8] = struct.pack("<Q", rng.choice((0, 1, 2**31, 2**62, 2**64 - 1, len(data))))
    else:
        for _ in range(rng.choice((1, 1, 1, 4, 64))):
            data[rng.randrange(min(len(data), rng.choice((200, 2000, 1 << 30))))] = rng.randrange(256)
    file.write_bytes(data)


def mutate_place(rng, file):
    data = file.read_bytes()
    file.unlink()
    what = rng.randrange(6)
    if what == 0:
        os.mkfifo(file)
    elif what == 1:
        file.mkdir()
    elif what == 2:
        file.symlink_to(file.name)
    elif what == 3:
        file.symlink_to("/dev/zero")
    elif what == 4:
        file.write_bytes(data[: len(data) // 2] + b"\xff\0" + data[len(data) // 2 :])


def damage(rng, folder):
    """One thing wrong in `folder`; gives its kind."""
    files = sorted(folder.iterdir())
    kind = rng.choices(("json", "header", "bytes", "place"), (45, 30, 15, 10))[0]
    wanted = {"json": ".json", "header": ".safetensors"}.get(kind, "")
    file = rng.choice([file for file in files if file.name.endswith(wanted)])
    {"json": mutate_json, "header": mutate_header, "bytes": mutate_bytes, "place": mutate_place}[kind](rng, file)
    return kind


def command_for(rng, folder, out):
    """A random command on the directory; `diff` compares it with the sound one."""
    known = [
        ("plan", folder, "-r", "int4-g32"),
        ("quantize", folder, out, "-r", "int4-g32"),
        ("inspect", folder),
        ("verify", folder),
        *(("export", folder, out, "--to", target) for target in ("mlx", "gguf", "dense")),
        ("import", folder, out),
        ("diff", folder, folder.parent / "sound" / folder.name),
    ]
    return [str(word) for word in rng.choice(known)]


def run_qkit(arguments):
    """Exit code and standard error of `qkit ARGUMENTS`, here; 124 after `SECONDS`."""

    class SlowError(BaseException):
        pass

    def end(signum, frame):
        raise SlowError

    said, before, argv = io.StringIO(), signal.signal(signal.SIGALRM, end), sys.argv
    sys.argv = ["qkit", *arguments]
    signal.alarm(SECONDS)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
            main()
    except SystemExit as stopped:
        code = stopped.code if isinstance(stopped.code, int) else 1
        return (124 if "SlowError" in said.getvalue() else code), said.getvalue()
    except SlowError:
        return 124, ""
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        sys.argv = argv
    raise AssertionError("main returned")


def check(number, home, sound):
    """Case `number`: what was wrong, what was run, its exit code, and the complaint, empty where all is well."""
    rng = random.Random(number)
    out = home / "out"
    if rng.random() < 0.1:
        file = home / "recipe.toml"
        file.write_text(mutate_toml(rng))
        kind, arguments = "recipe", ["plan", str(sound / "float"), "-r", str(file)]
        code, said = run_qkit(arguments)
        return kind, arguments[0], code, complaint(code, said)
    name = rng.choice(("float", "sharded", "artifact", "mlx", "foreign"))
    folder = home / name
    shutil.copytree(sound / name, folder)
    kind = damage(rng, folder)
    arguments = command_for(rng, folder, out)
    code, said = run_qkit(arguments)
    wrong = complaint(code, said)
    if not wrong and code == 0:
        wrong = doubt(arguments[0], name, folder, sound, out)
    if not wrong and code and out.exists():
        wrong = "a failure left its output"
    return kind, arguments[0], code, wrong and f"{name} {kind} {arguments[0]} {arguments[4:5]}: {code} {wrong}"


def complaint(code, said):
    if code not in CODES:
        return f"{code}: {said[-300:]}"
    if "Traceback" in said or (code >= 3 and not said.startswith(("qkit: ", "/"))):
        return said[-300:]
    return ""


def doubt(verb, name, folder, sound, out):
    """Why an exit code of 0 is wrong, if it is."""
    from safetensors import SafetensorError, safe_open

    for file in folder.glob("model*.safetensors"):
        try:
            with safe_open(file, framework="np"):
                pass
        except (SafetensorError, OSError) as error:
            return f"safetensors refuses {file.name}: {error}"
    if verb == "verify" and any(
        file.read_bytes() != (sound / name / file.name).read_bytes() for file in folder.glob("model*.safetensors")
    ):
        return "verified, and the weights are others"
    if verb in ("quantize", "import") and (problems := list(verify(out))):
        return f"wrote what does not verify: {problems[0]}"
    return ""


def mutate_toml(rng):
    what = rng.randrange(6)
    if what == 0:
        place = rng.randrange(len(RECIPE))
        return RECIPE[:place] + rng.choice(("[", '"', "\0", "=", "x", "\n", "1")) + RECIPE[place + 1 :]
    words = (
        "0",
        "-1",
        "true",
        '"x"',
        "[]",
        "{}",
        "1e400",
        "nan",
        "9" * 5000,
        "0x" + "f" * 5000,
        "[" * 3000,
        '["*"]',
        "2024-01-01",
    )
    key, old = rng.choice(
        (("schema", "1"), ("element", '"int4"'), ("group", "32"), ("match", '"*"'), ("weight", '"w"'))
    )
    if what == 1:
        return RECIPE + f"{rng.choice(WORDS)} = {rng.choice(words)}\n"
    if what == 2:
        return RECIPE.replace(
            'match = "*"', f"match = {json.dumps(['*' * rng.randrange(1, 2000)] * rng.randrange(2000))}"
        )
    return RECIPE.replace(f"{key} = {old}", f"{key} = {rng.choice(words)}")


def count(begin, end):
    """Outcomes of the cases from `begin` to `end`, and the complaints."""
    found, wrong = Counter(), []
    with TemporaryDirectory() as place:
        sound = Path(place) / "sound"
        sound.mkdir()
        make_sound(sound)
        for number in range(begin, end):
            kind, verb, code, bad = check(number, home := Path(place), sound)
            found[f"exit {code}"] += 1
            found[f"damage: {kind}"] += 1
            found[f"command: {verb}"] += 1
            if bad:
                wrong.append(f"{number}: {bad}")
            for name in (
                "out",
                "float",
                "sharded",
                "artifact",
                "mlx",
                "foreign",
                "recipe.toml",
                ".out.writing",
                ".out.journal",
            ):
                one = home / name
                if one.is_dir() and not one.is_symlink():
                    shutil.rmtree(one)
                else:
                    one.unlink(missing_ok=True)
    return found, wrong


if __name__ == "__main__":
    found, wrong = count(int(sys.argv[1]), int(sys.argv[2]))
    print(json.dumps({**dict(sorted(found.items())), "complaints": len(wrong), "first": wrong[:40]}, indent=1))
