# Each target does all its own set-up: the first one on a fresh machine makes .venv and installs what settings.ini names.
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test docs setup clean

demo: setup
	$(BIN)/python -m benchmarks.demo

test: setup
# the code of index.ipynb is that of README.md, which .ci/run runs from the wheel
	OMP_NUM_THREADS=1 $(BIN)/nbdev-test --n-workers 2 --timing --skip-file-re '^(index|[_.])'
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile tests

docs: setup
	OMP_NUM_THREADS=1 $(BIN)/python docs/build.py

setup:
	@bash .ci/setup $(VENV)

clean:
	rm -rf $(VENV) .wheel-env build dist *.egg-info demo _docs _proc
