# Every target makes and reuses .venv by itself; nothing is installed twice.
PYTHON ?= python3
BIN := .venv/bin
OFFLINE := --redact --no-validate --no-update-check

.PHONY: quickstart test chaos soak bench check secrets audit format manifests generated docs clean

quickstart: .venv/.runtime  ## the main job on what the repository carries
	$(BIN)/pacos quickstart

test: .venv/.dev  ## all tests that run without a GPU
	$(BIN)/python -m pytest --numprocesses=2 --dist=loadfile --no-loadscope-reorder --durations=25

chaos: .venv/.dev  ## faults on one machine, whole sweeps; on hosts of their own, with docs/chaos.md's table of what was seen
	$(BIN)/python -m pytest -m chaos --durations=25
	$(BIN)/python -m tests.chaos
	$(BIN)/python -m tests.chaos.table

MINUTES ?= 120
soak: .venv/.dev  ## everything at once on one machine's hosts, for MINUTES; docs/chaos.md has what was seen
	$(BIN)/python -m benchmarks.soak --minutes $(MINUTES) --json benchmarks/results/soak.json --plot docs/images/soak.png
	$(BIN)/python -m benchmarks.report

# What they measure on is given: make bench RECORDS=alpaca_data.json PROMPTS="koala.jsonl vicuna.jsonl" TOKENIZER=gpt2
bench: .venv/.dev  ## the recorded benchmarks anew, but those that lack a file, a GPU or a package; a day
	$(BIN)/python -m benchmarks $(if $(RECORDS),--records $(RECORDS)) $(if $(PROMPTS),--prompts $(PROMPTS)) \
		$(if $(TOKENIZER),--tokenizer $(TOKENIZER)) $(if $(PEERS),--peers $(PEERS))
	$(MAKE) generated

check: .venv/.dev secrets  ## lint, format, types, import contract, secrets
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

secrets: .venv/.dev  ## keys and passwords in what git has or would take; needs no network
	@if git rev-parse --git-dir >/dev/null 2>&1; \
	then git ls-files -z --cached --others --exclude-standard | xargs -0 $(BIN)/kingfisher scan $(OFFLINE); \
	else $(BIN)/kingfisher scan . --exclude .venv --exclude runs $(OFFLINE); fi

audit: secrets .venv/.audit  ## the same in git's history; known flaws in what is pinned, as PyPI knows them
	$(BIN)/kingfisher scan . --branch HEAD $(OFFLINE)
	$(BIN)/pip-audit --requirement constraints.txt --no-deps --disable-pip --strict --progress-spinner off

format: .venv/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

manifests: .venv/.runtime  ## what follows from other files: manifests, the Grafana dashboard
	$(BIN)/python -m cluster.generate

generated: manifests .venv/.dev  ## whatever is committed and follows from something else that is
	$(BIN)/python -m app.config.reference > docs/configuration.md
	$(BIN)/python -m benchmarks.report

docs: .venv/.dev  ## the book, into build/site
	$(BIN)/mkdocs build --strict

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

.venv/.dev: .venv/.created pyproject.toml constraints.txt
	$(BIN)/pip install --constraint constraints.txt --editable '.[dev]'
	@touch .venv/.runtime $@

.venv/.audit: .venv/.runtime
	$(BIN)/pip install --constraint constraints.txt --editable '.[audit]'
	@touch $@
