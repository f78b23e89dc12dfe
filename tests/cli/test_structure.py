"""The shape of the project: who may import whom, what a wheel installs, and what an import costs."""

import ast
import os
import re
import subprocess
import sys
import zipfile
from contextlib import suppress
from importlib import import_module
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from pkgutil import iter_modules

import pytest

import qkit
from qkit.native.build import compiler

ROOT = Path(__file__).parents[2]
FRAMEWORKS = {"torch", "torchao", "mlx", "mlx_lm", "transformers", "gguf", "compressed_tensors", "jax"}
PACKAGES = {
    "qkit": ROOT / "qkit",
    "qkit_mlx": ROOT / "backends/qkit_mlx",
    "qkit_torchao": ROOT / "backends/qkit_torchao",
}
MAY = {
    "qkit": set(),
    "qkit_mlx": {"mlx", "mlx_lm", "qkit", "qkit_mlx"},
    "qkit_torchao": {"torch", "torchao", "transformers", "qkit", "qkit_torchao"},
}
WITH_GGUF = {"qkit/exchange/export_gguf.py", "qkit/sources/gguf_file.py", "qkit/sources/gguf_blocks.py"}
ONLY_IN = {
    "mlx_lm": {"huggingface.py", "mended.py", "mlx_lora.py"},
    "transformers": {"huggingface.py", "names.py", "transformers.py", "tuning.py"},
    "torchao": {"containers.py"},
}


def imports(file):
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.partition(".")[0]


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_imports_only_what_it_may(package):
    forbidden = (FRAMEWORKS | set(PACKAGES) | {"qkit_recipes"}) - MAY[package] - {package}
    files = sorted(PACKAGES[package].rglob("*.py"))
    assert files
    for file in files:
        integrates = {"gguf"} if file.relative_to(ROOT).as_posix() in WITH_GGUF else set()
        assert not (forbidden - integrates) & set(imports(file)), file


@pytest.mark.parametrize("package", ["qkit_mlx", "qkit_torchao"])
def test_an_integration_lives_in_one_module(package):
    for file in PACKAGES[package].rglob("*.py"):
        for name, homes in ONLY_IN.items():
            assert file.name in homes or name not in set(imports(file)), file


@pytest.mark.parametrize("package", ["qkit_mlx", "qkit_torchao", "qkit_recipes"])
def test_a_plugin_package_is_a_hook_and_loads_no_framework(package):
    code = f"import sys, {package}; print(sorted({FRAMEWORKS!r} & set(sys.modules)))"
    assert run(code) == "[]\n"


def test_import_qkit_loads_no_framework():
    code = f"import sys, qkit; qkit.backends(); qkit.recipes(); print(sorted({FRAMEWORKS!r} & set(sys.modules)))"
    assert run(code) == "[]\n"


@pytest.mark.parametrize("name", PACKAGES)
def test_an_attribute_with_the_name_of_a_submodule_is_that_submodule(name):
    """Before the submodule is imported by somebody, and after."""
    if name != "qkit":
        pytest.importorskip({"qkit_mlx": "mlx.core", "qkit_torchao": "torch"}[name])
    hidden = []
    for package in _packages(import_module(name)):
        for _, below, _ in iter_modules(package.__path__):
            full = f"{package.__name__}.{below}"
            before = getattr(package, below, None)
            if below != "__main__":
                with suppress(ModuleNotFoundError):  # of a library that is not installed
                    import_module(full)
            after = getattr(package, below, None)
            hidden += [full] * (not {before, after} <= {None, sys.modules.get(full)})
    assert not hidden


def _packages(package):
    yield package
    for _, below, is_package in iter_modules(package.__path__):
        if is_package:
            yield from _packages(import_module(f"{package.__name__}.{below}"))


def test_dir_lists_what_users_call_and_nothing_else():
    code = "import qkit; print(*dir(qkit))"
    names = run(code).split()
    assert {"save", "load", "adapt", "merge", "Adapter", "prepare", "reference"} <= set(names)
    assert not {"Any", "TYPE_CHECKING", "import_module"} & set(names)
    assert names == sorted(qkit.__all__)
    assert all(hasattr(qkit, name) for name in names)


def test_the_law_is_within_reach_of_import_qkit():
    """Before any engine has been loaded, as somebody's own optimizer asks."""
    code = "import qkit; print(qkit.reference.learned.is_learned('layer.weight_scale'), qkit.reference.merged.Update.__name__)"
    assert run(code) == "True Update\n"


def test_import_qkit_costs_at_most_half_of_numpy_more():
    """Both in one process, numpy first; processor time, so that other work counts little; the best of seven processes."""
    code = """
from time import process_time as now
start = now(); import numpy; between = now(); import qkit; end = now()
print((end - start) / (between - start))
"""
    assert min(float(run(code)) for _ in range(7)) <= 1.5


def test_no_test_imports_from_another_test():
    for file in (ROOT / "tests").rglob("*.py"):
        assert not [name for name in imports(file) if name.startswith("test_")], file


def test_every_file_is_short_enough_to_read():
    for file in [*ROOT.glob("qkit/**/*.py"), *ROOT.glob("backends/**/*.py"), *ROOT.glob("recipes/**/*.py")]:
        assert len(file.read_text(encoding="utf-8").splitlines()) <= 300, file


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of this machine."""
    return make_wheel(tmp_path_factory.mktemp("wheel"))


def test_the_wheel_installs_exactly_four_names_and_the_kernels(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.partition("/")[0] for name in names if ".dist-info" not in name}
    assert tops == {"qkit", "qkit_mlx", "qkit_torchao", "qkit_recipes"}
    assert {f"{top}/py.typed" for top in tops} <= set(names)
    assert "qkit_recipes/int4-g64.toml" in names
    assert ("qkit/native/kernels.compiled" in names) == bool(compiler())
    assert wheel.stem.endswith("-py3-none-any") != bool(compiler())


def test_without_a_compiler_the_wheel_is_for_any_machine(tmp_path):
    wheel = make_wheel(tmp_path, CC="no-such-compiler")
    assert wheel.stem.endswith("-py3-none-any")
    names = zipfile.ZipFile(wheel).namelist()
    assert "qkit/native/kernels.c" in names
    assert "qkit/native/kernels.compiled" not in names


def test_the_build_that_asks_for_no_kernels_makes_the_wheel_for_any_machine(tmp_path):
    """Beside a compiled library in the source tree, too."""
    wheel = make_wheel(tmp_path, HATCH_BUILD_NO_HOOKS="true")
    assert wheel.stem.endswith("-py3-none-any")
    assert "qkit/native/kernels.compiled" not in zipfile.ZipFile(wheel).namelist()


@pytest.mark.parametrize(
    ("target", "machine", "tag"),
    [
        ("linux-x86_64", "x86_64", "linux_x86_64"),
        ("macosx-11.0-universal2", "arm64", "macosx_11_0_arm64"),
        ("macosx-11.0-arm64", "arm64", "macosx_11_0_arm64"),
    ],
)
def test_a_wheel_is_for_the_machine_that_its_kernels_are_compiled_for(target, machine, tag):
    pytest.importorskip("hatchling")
    spec = spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.tag_of(target, machine) == tag


@pytest.mark.skipif(not compiler() or sys.platform != "linux", reason="needs a compiler on Linux")
def test_the_kernels_ask_for_no_newer_libc_than_manylinux2014(wheel):
    """Their symbols have versions up to GLIBC_2.17, so that auditwheel gives the wheel that tag."""
    library = zipfile.ZipFile(wheel).read("qkit/native/kernels.compiled")
    versions = {tuple(map(int, one.split(b"."))) for one in re.findall(rb"GLIBC_([0-9.]+)", library)}
    assert versions
    assert max(versions) <= (2, 17)


def make_wheel(folder, **environment):
    pytest.importorskip("hatchling")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    assert find_spec("build")
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, **environment})
    (wheel,) = folder.glob("*.whl")
    return wheel


def run(code):
    usual = {name: value for name, value in os.environ.items() if not name.endswith("_NUM_THREADS")}  # see conftest.py
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, env=usual)
    return done.stdout
