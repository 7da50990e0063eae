# `make demo`: environment, install, the main job on the bundled model, figures/demo_report.html
# `make test`: environment if need be, then the tests
PYTHON ?= python3.11
VENV ?= .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: demo test slow lint format types bench docs dist clean

$(STAMP): pyproject.toml constraints.txt
	command -v $(PYTHON) >/dev/null && $(PYTHON) -m venv $(VENV) || python3 -m venv $(VENV)
	$(PY) -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $(STAMP)

demo: $(STAMP)
	$(VENV)/bin/mechicl report --model demo --task concepts --out figures/demo_report.html

# a worker with nothing left to do takes tests of another, so that long files (notebooks, pages, families) do not keep one of them busy at the end
test: $(STAMP)
	$(PY) -m pytest -n auto --maxprocesses 4 --dist worksteal --durations=20

# what `make test` leaves out, about an hour on two quiet cores: five families trained anew and their heads found (10 to 15 minutes each); then ten minutes
# for the link study with a taught prior, fine-tuning in two processes and within a study, the wheel in an environment of its own, the whole site, offloaded
# weights and too little memory in every analysis, and two Ray nodes whose workers, driver and node are killed (with the extra sweep; skipped without)
slow: $(STAMP)
	$(PY) -m pytest -m slow --durations=0

lint: $(STAMP)
	$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check .

format: $(STAMP)
	$(VENV)/bin/ruff format . && $(VENV)/bin/ruff check --fix .

# no error, and at least 99 % of what is public has a type that every checker reads alike (it looks for the installed package with the python it finds on PATH)
types: $(STAMP)
	$(VENV)/bin/pyright
	PATH="$(abspath $(VENV))/bin:$$PATH" pyright --verifytypes mechicl --ignoreexternal --outputjson | $(PY) -c "import json, sys; known = json.load(sys.stdin)['typeCompleteness']['completenessScore']; print(f'{known:.2%} of the public names have a known type'); sys.exit(known < 0.99)"

bench: $(STAMP)
	$(PY) -m benchmarks.hooks && $(PY) -m benchmarks.rows && $(PY) -m benchmarks.patching --quick && $(PY) -m benchmarks.kv

# a page or a docstring that would warn ends it; opens from disk: build/docs/index.html
docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build -f docs/site/mkdocs.yml

dist: $(STAMP)
	$(PY) -m build --no-isolation

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis dist build
