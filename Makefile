# Everything goes through these targets; `make help` lists them.
PYTHON ?= python3
BIN := .venv/bin
export HF_HUB_DISABLE_TELEMETRY := 1

.PHONY: help book test lab run lint bench floors publish assignments grade colab setup
.DEFAULT_GOAL := help

help: ## list the targets
	@grep -E '^[a-z]+:.*##' Makefile | sed -E 's/:.*## /|/' | awk -F'|' '{printf "make %-11s %s\n", $$1, $$2}'

setup: ## create .venv with the pinned environment and the default models
	@$(PYTHON) lib/tools/bootstrap.py

book: setup ## render the book (every warning is an error) and print its address
	@$(BIN)/jupyter-book build . --warningiserror --keep-going --quiet || { rm -rf _build; exit 1; }
	@echo; echo "The book is ready: file://$(CURDIR)/_build/html/index.html"

test: lint ## lint, unit tests, notebook rules, every notebook under nbval, the strict build, browser checks
	@OMP_NUM_THREADS=1 $(BIN)/pytest --nbval -n 2 --dist loadfile  # two processes of one thread beat one of two

lint: setup ## ruff, notebooks too
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .

lab: setup ## open the notebooks in JupyterLab
	@$(BIN)/jupyter trust $$(find book -name '*.ipynb' -not -path '*/.*') >/dev/null  # without it no figure is shown
	@$(BIN)/jupyter lab --notebook-dir=book

run: setup ## execute notebooks in place: make run CHAPTER=book/1-prompts/2-prompts-are-code.ipynb (all without it)
	@$(BIN)/python lib/tools/notebooks.py run $(CHAPTER)

bench: setup ## measure the budgets on this machine, print them and write lib/tuning/results/bench.json
	@HF_HUB_OFFLINE=1 $(BIN)/python -m tuning.experiments.bench

floors: ## unit tests at pyproject.toml's lower bounds: make floors TESTS=tests/test_lora.py (all without it)
	@$(PYTHON) lib/tools/floors.py $(TESTS)

publish: setup ## name the repository that notebooks install from: make publish REPO=owner/name TAG=v1.0.0
	@$(BIN)/python lib/tools/publish.py "$(REPO)" "$(TAG)"

assignments: setup ## student notebooks and lecturer's kits: make assignments SEED=4711 OUT=course
	@$(BIN)/python lib/tools/course.py --seed "$(SEED)" --out "$(OUT)"

grade: setup ## grade a folder of notebooks: make grade KIT=course/2-dora/lecturer SUBMISSIONS=handed-in OUT=graded
	@$(BIN)/python lib/tools/grade.py --kit "$(KIT)" --submissions "$(SUBMISSIONS)" --out "$(OUT)"

colab: setup ## run chapters and assignments as Colab does: each in a clean environment, installed from the published address
	@$(BIN)/python lib/tools/colab.py $(addprefix --with ,$(WITH)) $(CHAPTER)
