"""Every verb that writes, and every place that it could be sent to: nothing of anybody's is lost, and nothing is left behind."""

import os
import resource
import shutil
import signal
import subprocess
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from alike import contents
from checkpoints import TENSORS, killed_at, stream, write
from models import build
from tables import BUILDERS as ENGINES

import qkit
from qkit.adapters import Update
from qkit.adapters import formats as adapter_files
from qkit.cli.application import application
from qkit.cli.boundary import exit_code
from qkit.storage.staging import replaced_file, whole_file
from qkit.training.folder import Log, read_log

UPDATES = {"layer": Update(a=np.ones((2, 4), np.float32), b=np.ones((3, 2), np.float32), scale=1.0)}


def cli(*arguments):
    application(list(map(str, arguments)), standalone_mode=False)


def save(source, out):
    qkit.save(build(ENGINES[0]), out, backend=ENGINES[0])


def save_adapter(source, out):
    adapter_files.write(out, UPDATES, layout="peft", base={}, name=None, norms={})


#: By name: a function of a source and an output. A source that is not there proves that the output is looked at first.
VERBS = {
    "quantize": lambda source, out: cli("quantize", source, out, "-r", "int4-g64"),
    "import": lambda source, out: cli("import", source, out),
    "export to mlx": lambda source, out: cli("export", source, out, "--to", "mlx"),
    "export to dense": lambda source, out: cli("export", source, out, "--to", "dense"),
    "export to gguf": lambda source, out: cli("export", source, out, "--to", "gguf", "--without-tokenizer"),
    "merge": lambda source, out: cli("merge", source, source, out),
    "train": lambda source, out: cli("train", source, out, "-r", "int4-g32", "--data", "nowhere.txt"),
    "teach": lambda source, out: cli("teach", source, out, "--data", "nowhere.txt"),
    "compare": lambda source, out: cli("compare", source, "--data", "nowhere.txt", "--out", out, "-r", "int4-g64"),
    "demo": lambda source, out: cli("demo", "--out", out),
    "save": save,
    "save an adapter": save_adapter,
}
FILES = {"export to gguf", "teach"}
NEEDS_ENGINE = {"save", "train", "teach", "demo"}
WRITES_INTO = {"compare": "report.html", "demo": "float"}  #: verbs whose OUT is a directory of outputs; one of them


def tree(home):
    """Everything below `home`, links not followed."""
    found = {}
    for entry in sorted(home.rglob("*")):
        if entry.is_symlink():
            found[str(entry)] = os.readlink(entry)
        else:
            found[str(entry)] = entry.read_bytes() if entry.is_file() else "a directory"
    return found


def near(out, verb, ending):
    """The name that qkit would use for a while beside an output of `verb`."""
    out = out / WRITES_INTO[verb] if verb in WRITES_INTO else out
    out.parent.mkdir(exist_ok=True, parents=True)
    return out.with_name(f".{out.name}.{ending}")


def in_a_file(home, verb):
    (home / "file").write_text("x")
    return home / "file" / "deeper" / "out"


def a_file(home, verb):
    (home / "out").write_text("x")
    return home / "out"


def a_loop(home, verb):
    (home / "out").symlink_to(home / "other")
    (home / "other").symlink_to(home / "out")
    return home / "out"


def a_link_to_an_absent_disk(home, verb):
    (home / "out").symlink_to(home / "disk" / "models")
    return home / "out"


def below_a_link_to_an_absent_disk(home, verb):
    (home / "models").symlink_to(home / "disk" / "models")
    return home / "models" / "out"


def a_directory_of_theirs(home, verb):
    folder = home / "out" / ("" if verb not in WRITES_INTO or verb == "compare" else "start")
    folder.mkdir(parents=True)
    (folder / ("report.html" if verb == "compare" else "thesis.txt")).write_text("x")
    return home / "out"


def a_link_to_a_directory_of_theirs(home, verb):
    a_directory_of_theirs(home, verb).rename(home / "big")
    (home / "out").symlink_to(home / "big")
    return home / "out"


def their_directory_in_the_way(ending):
    def hazard(home, verb):
        path = near(home / "out", verb, ending)
        path.mkdir()
        (path / "thesis.txt").write_text("x")
        return home / "out"

    return hazard


def their_artifact_in_the_way(ending):
    """A directory that qkit wrote, and that its owner keeps under that name."""

    def hazard(home, verb):
        write(near(home / "out", verb, ending))
        return home / "out"

    return hazard


def their_link_in_the_way(ending):
    def hazard(home, verb):
        (home / "big").mkdir()
        near(home / "out", verb, ending).symlink_to(home / "big")
        return home / "out"

    return hazard


def their_journal(home, verb):
    near(home / "out", verb, "journal").write_text("dear diary")
    return home / "out"


HAZARDS = {
    "in a file": (in_a_file, "is a file"),
    "a file": (a_file, "is a file|exists: remove it|is there already"),
    "a loop": (a_loop, "is a link to .* there is no"),
    "a link to an absent disk": (a_link_to_an_absent_disk, "make that directory or mount its disk"),
    "below such a link": (below_a_link_to_an_absent_disk, "make that directory or mount its disk"),
    "a name of 256 bytes": (lambda home, verb: home / ("é" * 128) / "x", "256 bytes long"),
    "a name too long with ours": (lambda home, verb: home / ("é" * 125), "250 bytes long"),
    "a path too long": (lambda home, verb: home.joinpath(*["deep"] * 900), "bytes long"),
    "their directory": (a_directory_of_theirs, "did not write"),
    "a link to their directory": (a_link_to_a_directory_of_theirs, "did not write"),
    **{f"their .{e}": (their_directory_in_the_way(e), "holds thesis.txt, and qkit") for e in ("writing", "old")},
    **{f"their artifact .{e}": (their_artifact_in_the_way(e), "holds .*, and qkit") for e in ("writing", "old")},
    **{f"their link .{e}": (their_link_in_the_way(e), "is a link, and qkit") for e in ("writing", "old")},
    "their journal": (their_journal, "is another program's"),
}
#: Names that a verb does not use: its output is a directory whose own files are written one by one.
APART = {("compare", "a name too long with ours"), ("demo", "a name too long with ours")}
#: A directory stands where a file should go: refused in its own words.
OTHER_WORDS = {
    (verb, hazard): "exists|there already" for verb in FILES for hazard in HAZARDS if "their directory" in hazard
}


@contextmanager
def refused(message):
    """An error of qkit's with the code of bad input or of a place that cannot be written."""
    with pytest.raises(qkit.QkitError, match=message) as caught:
        yield
    assert exit_code(caught.value) in (3, 5)


def needs(verb):
    if verb in NEEDS_ENGINE and not ENGINES:
        pytest.skip("needs an engine")


@pytest.mark.parametrize("hazard", HAZARDS)
@pytest.mark.parametrize("verb", VERBS)
def test_what_cannot_or_must_not_be_written_is_refused_before_any_work(tmp_path, verb, hazard):
    needs(verb)
    if (verb, hazard) in APART:
        pytest.skip("its own name is not used with a prefix")
    make, message = HAZARDS[hazard]
    out = make(tmp_path, verb)
    before = tree(tmp_path)
    with refused(OTHER_WORDS.get((verb, hazard), message)):
        VERBS[verb](tmp_path / "nowhere", out)
    assert tree(tmp_path) == before


def test_a_name_with_a_nul_is_refused(tmp_path):
    with refused("has a NUL in it|null byte"):
        save_adapter(None, tmp_path / "a\0b")


def test_a_run_folder_of_somebody_s_is_refused(tmp_path):
    (tmp_path / "out.run").mkdir()
    (tmp_path / "out.run" / "checkpoint-1.safetensors").write_text("x")
    before = tree(tmp_path)
    with refused(r"out\.run holds checkpoint-1\.safetensors, and qkit"):
        VERBS["train"](tmp_path / "nowhere", tmp_path / "out")
    assert tree(tmp_path) == before


# Disks


@pytest.fixture
def mounted(tmp_path):
    """A function that mounts a file system at a new directory."""
    points = []

    def mount(name, *options):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        command = ["mount", *(options or ("-t", "tmpfs", "-o", "size=8m", "tmpfs")), str(folder)]
        if os.geteuid() or not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("needs the right to mount")
        points.append(folder)
        return folder

    yield mount
    for folder in reversed(points):
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("verb", VERBS)
def test_a_read_only_disk_is_refused_before_any_work(tmp_path, mounted, verb):
    needs(verb)
    disk = mounted("disk", "-t", "tmpfs", "-o", "ro,size=1m", "tmpfs")
    with refused("is on a read-only disk") as _:
        VERBS[verb](tmp_path / "nowhere", disk / "new" / "out")
    assert not list(disk.iterdir())


DIRECTORIES = [verb for verb in VERBS if verb not in FILES and verb not in WRITES_INTO]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """By verb, a source that it works on."""
    if not ENGINES:
        pytest.skip("needs an engine")
    home = tmp_path_factory.mktemp("models")
    qkit.save(build(ENGINES[0]), home / "float", backend=ENGINES[0])
    qkit.save(qkit.convert(build(ENGINES[0]), "int4-g32"), home / "int4", backend=ENGINES[0])
    cli("export", home / "int4", home / "mlx", "--to", "mlx")
    return {"quantize": home / "float", "import": home / "mlx", "save": None, "save an adapter": None} | {
        verb: home / "int4" for verb in VERBS if verb.startswith("export")
    }


WORKING = ["quantize", "import", "export to mlx", "export to dense", "save", "save an adapter"]


@pytest.mark.parametrize("verb", WORKING)
def test_a_mount_point_is_filled_from_inside_and_never_replaced(models, tmp_path, mounted, verb):
    VERBS[verb](models[verb], tmp_path / "plain")
    plain = contents(tmp_path / "plain")
    disk = mounted("disk")
    (disk / "lost+found").mkdir()  # as on a new volume
    beside = {entry.name for entry in tmp_path.iterdir()}
    VERBS[verb](models[verb], disk)
    (disk / "lost+found").rmdir()
    assert contents(disk) == plain
    assert {entry.name for entry in tmp_path.iterdir()} == beside
    with refused(r"is a mount point and holds a model, which cannot be replaced in one step: .*disk/model"):
        VERBS[verb](models[verb], disk)
    assert contents(disk) == plain


@pytest.mark.parametrize("verb", DIRECTORIES)
def test_a_mount_point_that_cannot_be_filled_is_refused_before_any_work(tmp_path, mounted, verb):
    needs(verb)
    disk = mounted("disk")
    (disk / "thesis.txt").write_text("x")
    with refused(r"is a mount point.*choose a directory inside it, such as .*disk/model"):
        VERBS[verb](tmp_path / "nowhere", disk)
    assert contents(disk) == {"thesis.txt": b"x"}


def test_checkpoints_do_not_go_to_the_disk_beside_a_mount_point(tmp_path, mounted):
    disk = mounted("disk")
    with refused("is a mount point, and checkpoints go beside the model: .*disk/model"):
        VERBS["train"](tmp_path / "nowhere", disk)
    assert [entry.name for entry in tmp_path.iterdir()] == ["disk"]


def test_another_place_of_the_same_disk_is_a_mount_point_too(tmp_path, mounted):
    (tmp_path / "real").mkdir()
    disk = mounted("a disk", "--bind", str(tmp_path / "real"))
    assert not os.path.ismount(disk)
    write(disk)
    assert set(contents(tmp_path / "real")) == set(contents(disk))
    assert {entry.name for entry in tmp_path.iterdir()} == {"real", "a disk"}


@pytest.mark.parametrize("call", ["rename", "unlink", "rmdir", "fsync"])
def test_a_kill_at_a_mount_point_leaves_nothing_that_opens_or_all(tmp_path, mounted, call):
    new, kills = contents(write(tmp_path / "new")), 0
    for k in range(1, 30):
        disk = mounted(f"disk{k}")
        if not killed_at(call, k, write, disk, fingerprint="x"):
            break
        kills += 1
        found = {entry.name for entry in disk.iterdir()}
        assert "config.json" not in found or {*new} - {"qkit.json"} <= found
        if "qkit.json" not in found:  # else it was whole, and only its traces were left
            write(disk, fingerprint="x")
        assert {name: data for name, data in contents_of_files(disk).items() if not name.startswith(".")} == new
    assert kills > 1 or call == "rmdir"


def contents_of_files(folder):
    return {entry.name: entry.read_bytes() for entry in folder.iterdir() if entry.is_file()}


# Links


def linked(home, how):
    """An output behind a link, and where it is in truth."""
    (home / "real").mkdir()
    real = home / "real" / "out"
    if how == "a link to an empty directory":
        real.mkdir()
    if how == "below a link":
        (home / "way").symlink_to(home / "real")
        return home / "way" / "out", real
    (home / "out").symlink_to(real)
    return home / "out", real


@pytest.mark.parametrize("how", ["a link to an empty directory", "a dangling link", "below a link"])
@pytest.mark.parametrize("verb", [*WORKING, "export to gguf"])
def test_links_are_followed_to_the_real_place_and_stay(models, tmp_path, verb, how):
    if verb in FILES and how == "a link to an empty directory":
        pytest.skip("a file is written where nothing is")
    VERBS[verb](models[verb], tmp_path / "plain")
    out, real = linked(tmp_path, how)
    links = {path: value for path, value in tree(tmp_path).items() if isinstance(value, str) and value != "a directory"}
    VERBS[verb](models[verb], out)
    assert (real.read_bytes() if verb in FILES else contents(real)) == (
        (tmp_path / "plain").read_bytes() if verb in FILES else contents(tmp_path / "plain")
    )
    assert [entry.name for entry in (tmp_path / "real").iterdir()] == ["out"]
    assert links.items() <= tree(tmp_path).items()
    if verb not in FILES:  # and again, over what is there; and not over what has come to it
        VERBS[verb](models[verb], out)
        (real / "thesis.txt").write_text("x")
        before = tree(tmp_path)
        with refused("holds thesis.txt, which save did not write"):
            VERBS[verb](models[verb], out)
        assert tree(tmp_path) == before


def test_what_comes_to_the_output_during_the_work_is_not_removed_with_the_old_one(tmp_path):
    out = write(tmp_path / "out")
    with pytest.raises(qkit.ArtifactError, match=r"holds notes\.txt"):
        write_with_a_visitor(out, fingerprint="x")
    assert (out / "notes.txt").read_text() == "x"
    (out / "notes.txt").unlink()
    write(out, fingerprint="x")
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def write_with_a_visitor(out, **options):
    from qkit.storage.write import write_directory

    streams = [stream(name, array) for name, array in TENSORS.items()]
    blocks = streams[0].blocks

    def visited():
        (out / "notes.txt").write_text("x")
        return blocks()

    streams[0] = type(streams[0])(streams[0].slot, visited)
    write_directory(out, streams, metadata={"qkit": "é"}, files={"config.json": b"{}"}, **options)


def test_a_hard_link_to_a_replaced_artifact_keeps_its_bytes(tmp_path):
    """The old directory waits to be removed when a kill comes; its files are not written into again."""
    out = write(tmp_path / "out", {"old": np.ones(3)}, fingerprint="x")
    shutil.copytree(out, tmp_path / "backup", copy_function=os.link)
    before = contents(tmp_path / "backup")
    assert killed_at("unlink", 2, write, out, fingerprint="y")  # the first is that of the mark
    assert (tmp_path / ".out.writing").exists()
    write(out, fingerprint="y")
    assert contents(tmp_path / "backup") == before


# Full disks


def test_a_full_disk_leaves_nothing_of_a_gguf_file_or_its_parents(models, mounted):
    disk = mounted("disk", "-t", "tmpfs", "-o", "size=64k", "tmpfs")
    with pytest.raises(OSError, match="No space left"):
        VERBS["export to gguf"](models["export to gguf"], disk / "a" / "b" / "model.gguf")
    assert list(disk.iterdir()) == []


@pytest.mark.parametrize("verb", ["quantize", "save", "export to dense", "save an adapter"])
def test_a_full_disk_leaves_no_empty_parents(models, mounted, verb):
    disk = mounted("disk", "-t", "tmpfs", "-o", "size=4k", "tmpfs")
    with pytest.raises((OSError, qkit.PlanError), match=r"No space left|make room"):
        VERBS[verb](models[verb], disk / "a" / "b" / "out")
    assert list(disk.iterdir()) == []


@pytest.mark.parametrize("write_file", [whole_file, replaced_file])
def test_a_failed_file_leaves_nothing(tmp_path, write_file):
    def fail():
        with write_file(tmp_path / "a" / "b" / "file") as aside:
            aside.write_text("x")
            raise OSError("half")

    with pytest.raises(OSError, match="half"):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_keeps_the_log_of_a_run_that_goes_on(tmp_path):
    """A limit on the size of files stands for the disk: the rest of the log has no room."""
    log = Log(tmp_path, after=-1)
    for step in range(200):
        log.add({"event": "step", "step": step, "loss": 1.0})
    before = log.file.read_bytes()
    child = os.fork()
    if not child:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, len(before) // 2))
        try:
            Log(tmp_path, after=150)
        except OSError:
            os._exit(7)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert log.file.read_bytes() == before
    assert [event["step"] for event in read_log(Log(tmp_path, after=150).file)] == list(range(151))
    assert [entry.name for entry in tmp_path.iterdir()] == ["log.jsonl"]


def test_a_line_that_was_cut_does_not_swallow_the_next(tmp_path):
    log = Log(tmp_path, after=-1)
    log.add({"event": "step", "step": 1})
    with log.file.open("a") as stream:
        stream.write('{"event": "st')
    Log(tmp_path, after=1).add({"event": "resume", "step": 1})
    assert [event["event"] for event in read_log(log.file)] == ["step", "resume"]


def test_reports_of_somebody_s_own_are_not_replaced_and_other_files_stay(tmp_path):
    for name in ("report.html", "report.json", "report.png"):
        home = tmp_path / name
        home.mkdir()
        (home / name).write_text("mine")
        with refused(rf"{name} is there, and qkit did not write it"):
            VERBS["compare"](tmp_path / "nowhere", home)
        assert contents(home) == {name: b"mine"}


def test_the_paths_of_messages_are_those_that_were_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("out").mkdir()
    Path("out/thesis.txt").write_text("x")
    with refused("^out holds"):
        VERBS["import"]("nowhere", "out")
