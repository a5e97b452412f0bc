# Two commands do everything: `make reproduce` and `make test`. The README gives the same without make.
PYTHON     ?= python3
EXPERIMENT ?= digits
CORES      ?= $(shell env -u OMP_NUM_THREADS -u OMP_THREAD_LIMIT nproc 2>/dev/null || sysctl -n hw.ncpu)
BIN        := .venv/bin
READY      := .venv/.installed
BOOK       := build/book/_build/html/index.html
SNAKEMAKE  := $(BIN)/snakemake --quiet rules host progress reason --cores $(CORES) --config experiment=$(EXPERIMENT)
JB         := $(BIN)/jupyter-book build . --path-output build/book -W -n --keep-going

.PHONY: help reproduce results book test lint clean

help:
	@echo "make reproduce   train everything of an experiment anew (EXPERIMENT=$(EXPERIMENT)) and build the book from it"
	@echo "make test        all tests"
	@echo "make book        build the book from the stored results"
	@echo "make results     run what is missing in the stored results (for maintainers)"

$(READY): pyproject.toml
	@echo "== installing into .venv (torch is large: this takes minutes)"
	$(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install -e '.[all]'
	@touch $(READY)

# A reproduction trains in a folder of its own, so that it cannot pass off stored runs as new ones;
# the other experiments' stored results are copied beside it for the book.
STARTED := reproduction/.started-$(EXPERIMENT)
# Ctrl-C ends the recipe's shell as well, unless that traps it.
STOPPED := { if [ "$$stopped" ]; then echo "== stopped; nothing is lost, the same call goes on from there"; \
  else echo "== failed, see above; what is finished is kept"; fi; exit 1; }

.PHONY: experiment
experiment:
	@test -f "experiments/$(EXPERIMENT).yaml" || { echo "error: no experiment '$(EXPERIMENT)'; there are: $(basename $(notdir $(wildcard experiments/*.yaml)))"; exit 2; }

$(STARTED): | experiment $(READY)
	@mkdir -p reproduction
	@ls reproduction/.started-* >/dev/null 2>&1 || cp -R results/. reproduction/
	rm -rf reproduction/*/$(EXPERIMENT) $(foreach end,.csv -runs.csv -teacher.csv,reproduction/tables/$(EXPERIMENT)$(end))
	@touch $@

reproduce: $(STARTED)
	@echo "== training $(EXPERIMENT) on $(CORES) cores"
	@trap stopped=1 INT; FMD_RESULTS="$(CURDIR)/reproduction" $(SNAKEMAKE) || $(STOPPED)
	@echo "== building the book, which takes a minute or two"
	FMD_RESULTS="$(CURDIR)/reproduction" $(JB) --all
	FMD_RESULTS="$(CURDIR)/reproduction" $(BIN)/python -m fmd.results $(EXPERIMENT) --against results
	@echo "== open $(CURDIR)/$(BOOK)"

results: $(READY)
	$(SNAKEMAKE)

book: $(READY)
	$(JB) --all
	@echo "== open $(CURDIR)/$(BOOK)"

test: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest -n $(CORES)

lint: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf build reproduction .snakemake
