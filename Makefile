# Every target makes and reuses .venv by itself; nothing is installed twice.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: quickstart test chaos check format manifests clean

quickstart: .venv/.runtime  ## the main job on what the repository carries
	$(BIN)/pacos quickstart

test: .venv/.dev  ## all tests that run without a GPU
	$(BIN)/python -m pytest --numprocesses=2 --dist=loadfile --no-loadscope-reorder --durations=25

chaos: .venv/.dev  ## faults on a cluster of hosts of their own, and docs/chaos.md's table of what was seen
	$(BIN)/python -m tests.chaos
	$(BIN)/python -m tests.chaos.table

check: .venv/.dev  ## lint, format, types, import contract
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: .venv/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

manifests: .venv/.runtime  ## what follows from serve_config.yaml and cluster/kubernetes/raycluster.yaml
	$(BIN)/python -m cluster.generate

clean:
	rm -rf .venv build dist *.egg-info

.venv/.created:
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v < (3, 14) else \
		f"error: {sys.executable} is Python {v[0]}.{v[1]}; pacos needs 3.11 to 3.13: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv .venv
	@touch $@

.venv/.runtime: .venv/.created pyproject.toml constraints.txt
	$(BIN)/pip install --constraint constraints.txt --editable .
	@touch $@

.venv/.dev: .venv/.runtime
	$(BIN)/pip install --constraint constraints.txt --editable '.[dev]'
	@touch $@
