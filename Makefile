# Each target installs what it needs into .venv; a second run finds it there.
PYTHON ?= python3
BIN = .venv/bin
READY = .venv/.ready

.PHONY: demo studio test lint docs bench gpu mutants faults clean

demo: $(READY)
	$(BIN)/python examples/digits.py --outdir runs/demo

# After `make demo`: its network, its run and its digits in the browser, on this machine alone.
studio: $(READY)
	$(BIN)/diffit studio --runs runs/demo --data runs/demo/data/digits-train.zip

test: $(READY)
	$(BIN)/python -m pytest -n logical --maxprocesses 8 --dist worksteal

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(READY)
	$(BIN)/python docs/errors.py
	$(BIN)/zensical build --strict --clean

bench: $(READY)
	$(BIN)/python -m benchmarks

# On a machine with GPUs; make gpu CIFAR10=cifar-10-python.tar.gz also trains on it for ten minutes.
gpu: $(READY)
	$(BIN)/python -m benchmarks.gpu $(if $(CIFAR10),--cifar10 $(CIFAR10))

mutants: $(READY)
	$(BIN)/python -m benchmarks.mutants --sample 60

faults: $(READY)
	$(BIN)/python -m benchmarks.faults_training
	$(BIN)/python -m benchmarks.faults_hostile
	$(BIN)/python -m benchmarks.faults_files 5000 & \
	$(BIN)/python -m benchmarks.faults_options --count 1500; options=$$?; wait $$! && exit $$options

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "diffit needs Python 3.11 or newer, this is " + sys.version.split()[0] + "; name another one: make PYTHON=python3.12 …")'
	@echo "installing into .venv (PyTorch is large: a minute or two)"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[all,docs,dev]'
	@touch $@

clean:
	rm -rf .venv .pytest_cache .ruff_cache .mypy_cache
