# Every target makes what it needs first: a virtual environment in .venv with the library and its tools.
# All it assumes is make and a Python of 3.11 or newer (PYTHON=python3.12 make demo, to choose one).
PYTHON ?= python3
BIN := .venv/bin
MODULES := $(filter-out nbs/reports/%,$(wildcard nbs/*.ipynb nbs/*/*.ipynb))
export NO_ALBUMENTATIONS_UPDATE := 1
.DEFAULT_GOAL := help
.PHONY: help demo test test-all docs bench lab notebooks readme publish check hooks clean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /make \1\t/' | expand -t 18

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "histonb needs Python 3.11 or newer; this is $$($(PYTHON) --version). Try: PYTHON=python3.11 make ..."; exit 1; }
	$(PYTHON) -m venv .venv || { rm -rf .venv; echo "No venv module. On Debian: apt-get install python3-venv"; exit 1; }

.venv/%.installed: settings.ini setup.py | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[$*]'
	@touch $@

demo: .venv/dev.installed ## slides to benchmark table on synthetic slides; 10 to 20 minutes on 2 cores
	$(BIN)/histonb run runs/demo.yaml

test: export OMP_NUM_THREADS := 1
test: .venv/dev.installed ## the tests and every notebook; well under half an hour
	$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder -m "not slow and not bench"
	$(BIN)/nbdev_test --n_workers 2

test-all: .venv/dev.installed ## the slow tests too
	$(BIN)/python -m pytest -m "not bench"
	$(BIN)/nbdev_test --n_workers 2 --flags slow

docs: .venv/docs.installed .venv/dev.installed ## the site, into _site/html
	$(BIN)/python -m sphinx -q -W -b html nbs _site/html
	@echo "Open _site/html/index.html"

bench: .venv/bench.installed .venv/dev.installed ## speed against what one would use instead, as ratios
	@for script in tests/bench_*.py; do echo "== $$script"; $(BIN)/python $$script || exit 1; done

lab: .venv/dev.installed ## JupyterLab on the notebooks
	$(BIN)/jupyter lab --notebook-dir nbs

notebooks: export HISTONB_BATCH := 1
notebooks: .venv/dev.installed ## execute the module notebooks and save their outputs, export, clean
	@for nb in $(or $(NB),$(MODULES)); do echo $$nb; \
		$(BIN)/jupyter nbconvert --to notebook --execute --inplace --ExecutePreprocessor.kernel_name=python3 --log-level=ERROR $$nb || exit 1; done
	$(BIN)/nbdev_export
	$(BIN)/nbdev_clean
	$(MAKE) readme

readme: .venv/dev.installed ## README.md from nbs/index.ipynb
	$(BIN)/python -m histonb.studies.readme

publish: ## keep the figures of the last demo in runs/published, from which README takes its results
	@for stage in runs/demo/*/metrics.json; do kept=runs/published/demo/$$(basename $$(dirname $$stage)); mkdir -p $$kept; \
		cp $$stage $$(dirname $$stage)/provenance.json $$kept; done
	cp runs/demo/compare/report.html runs/published/demo/compare

check: .venv/dev.installed ## quick: lint, and notebooks, library and README in step
	$(BIN)/ruff check .
	$(BIN)/python -m pytest tests/test_sync.py

hooks: .venv/dev.installed ## let git run the quick checks at every commit
	$(BIN)/pre-commit install

clean: ## remove what can be made again, except .venv and runs
	rm -rf _site _proc _docs jupyter_execute build *.egg-info .pytest_cache .ruff_cache
