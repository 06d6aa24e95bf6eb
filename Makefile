# On a machine with Python 3.11 or newer and nothing else: make demo, make test. The others measure, or break things.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
KUAIRAND ?= $(wildcard ../shared/data/kuairand_pure*)

.PHONY: demo test lint bench bench-quick study study-gca soak chaos clean

demo: $(VENV)/.installed
	@$(BIN)/crossrep demo $(if $(KUAIRAND),--kuairand $(KUAIRAND))

test: $(VENV)/.installed lint
	@CROSSREP_KUAIRAND="$(KUAIRAND)" $(BIN)/python -m pytest -n 2 --dist worksteal

lint: $(VENV)/.installed
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check -q .
	@$(BIN)/mypy
	@$(BIN)/lint-imports > .lint-imports.log || { cat .lint-imports.log; exit 1; }

# An hour: everything that docs/performance.md shows, side by side. Figures and plots go to docs/performance/.
BENCH := $(BIN)/python -m benchmarks
bench: $(VENV)/.installed
	@$(BENCH).quick --rows 1000000 --rows 5000000 --rows 15000000 --runs 3 --out docs/performance/quick.json
	@$(BENCH).quick --rows 10000000 --users 2000000 --zipf 0 --flush 1s --no-peers --out docs/performance/uniform.json
	@$(BENCH).quick --rows 10000000 --users 2000000 --flush 1s --no-peers --out docs/performance/zipf.json
	@$(BENCH).peers
	@$(BENCH).restore
	@$(BENCH).infer
	@$(BENCH).end_to_end --load 0.1 --load 0.5 --load 0.9
	@$(BENCH).growth
	@$(BENCH).plots

# The headline in minutes: crossrep, Kafka Streams, and the limits, on the same rows. The last line is JSON.
bench-quick: $(VENV)/.installed
	@$(BIN)/python -m benchmarks.quick

# What representations bring to a click model (docs/study.md), the upstream beside others and retrieval (docs/study-upstream.md). Runs that
# docs/study/*.jsonl hold are not done again: without these files all are, in about an hour. Cut off, it goes on where it was.
study: $(VENV)/.installed
	@test -n "$(KUAIRAND)" || { echo "no KuaiRand here; name its folder: make study KUAIRAND=..."; exit 1; }
	@$(BIN)/crossrep study transfer $(KUAIRAND) --out docs/study
	@$(BIN)/crossrep study upstreams $(KUAIRAND) --out docs/study
	@$(BIN)/crossrep study retrieval $(KUAIRAND) --out docs/study

# Gated cross-attention on two domains: docs/study-gca.md. A quarter of an hour; cut off, it goes on where it was. Any folder of that form does.
TWO_DOMAINS ?= ../shared/data/amazon_food_kitchen
study-gca: $(VENV)/.installed
	@$(BIN)/crossrep study gca $(TWO_DOMAINS) --out docs/study-gca

# A fold worker's memory over ten minutes of full load; SOAK="--help" explains.
SOAK ?= --minutes 10
soak: $(VENV)/.installed
	@$(BIN)/python -m benchmarks.soak $(SOAK)

# Half an hour under seeded faults; CHAOS="--help" explains, CHAOS="--brokers 3 --faults 20" rehearses the loss of brokers.
CHAOS ?= --seed 1 --faults 60
chaos: $(VENV)/.installed
	@$(BIN)/python -m tests.chaos $(CHAOS)

# Everything, torch included: a minute or two, once.
$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "crossrep needs Python 3.11 or newer; this is %s. Name one: make PYTHON=..." % sys.version.split()[0])'
	@echo "installing into $(VENV) (6 GB with torch, once)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --progress-bar on -e ".[dev]"
	@touch $@

clean:
	@test ! -x $(BIN)/crossrep || $(BIN)/crossrep kafka down
	rm -rf $(VENV) .crossrep .lint-imports.log
