# Everything a person does with ctxnb, in one place. `make help` lists the targets.
# The first of the Pythons that were tried; `make PYTHON=/path/to/python` takes another.
PYTHON ?= $(firstword $(foreach p,python3.11 python3.12 python3.13 python3,$(shell $(p) -c 'import sys; sys.version_info[:2] in ((3, 11), (3, 12), (3, 13)) and print(sys.executable)' 2>/dev/null)))
BIN    := .venv/bin
RUNS   := $(or $(CTXNB_RUNS),data/runs)
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: help setup run site lab test test-rest test-all test-system-deps lint gpu-bundle gpu-rehearsal gpu-collect golden export scorecard readme check
help:        ## list the targets
	@sed -nE 's/^([a-z-]+):.*## (.*)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 26

setup: .venv/.ready  ## make .venv from requirements.lock and install ctxnb into it

.venv/.ready: requirements.lock settings.ini setup.py
	@$(PYTHON) -c 'import sys; sys.version_info[:2] in ((3, 11), (3, 12), (3, 13)) or sys.exit(1)' 2>/dev/null || { echo "Python 3.11, 3.12 or 3.13 is needed, and $(or $(PYTHON),none of them) was found: say make PYTHON=/path/to/python3.12"; exit 1; }
	$(PYTHON) -m venv .venv || { echo "python's venv module is missing: on Debian, apt install python3-venv"; exit 1; }
	$(BIN)/pip install -q -r requirements.lock
	$(BIN)/pip install -q --no-deps --no-build-isolation -e .
	@touch $@

# The main job first: its answer is on the screen as soon as it is there. TINY=1 gives every grid but the smallest a size for CI, and its table another name.
QUICK = train counts synthetic synthetic_features synthetic_transformer measure
run: .venv/.ready  ## run the quick grids, the training first, print its answer, build the site
	@mkdir -p $(RUNS)/tables
	@for name in $(QUICK); do \
	  grid=data/grids/quick/$$name.toml; \
	  tiny=; preset=quick; if [ -n "$(TINY)" ] && [ -f tests/tiny/$$name ]; then tiny=$$(cat tests/tiny/$$name); preset=tiny; fi; \
	  table=$(RUNS)/tables/$$name-$$preset.parquet; \
	  $(BIN)/ctxnb run $$grid $$tiny && $(BIN)/ctxnb results $$grid $$tiny -o $$table || exit 1; \
	  if [ $$name = train ]; then $(BIN)/ctxnb best $$table || exit 1; fi; \
	done
	@$(MAKE) --no-print-directory site
	@echo "The pages: site/index.html"

site: .venv/.ready  ## rebuild the site from the notebooks and the tables at hand
	$(BIN)/python docs/build.py

lab: .venv/.ready  ## open JupyterLab at its start page
	@$(BIN)/jupyter labextension disable --level=sys_prefix @jupyterlab/apputils-extension:announcements 2>/dev/null  # it asks whether to fetch news
	$(BIN)/jupyter lab --config=jupyter_lab_config.py --LabApp.default_url=/lab/tree/nbs/start.ipynb $(if $(filter 0,$(shell id -u)),--allow-root)

# Notebooks that take a minute or more: `make test-rest` runs them.
SLOW_NOTEBOOKS = intrinsic_entropy

# Two workers, each with one thread. The result pages are run by tests/test_pages.py, which compares what they print.
NOTEBOOKS = OMP_NUM_THREADS=1 $(BIN)/nbdev_test --n_workers 2 --timing
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests --durations=15

test: .venv/.ready  ## run the notebooks and the fast tests
	$(NOTEBOOKS) --skip_folder_re '^[_.]|^results$$' --skip_file_re '^[_.]|^($(SLOW_NOTEBOOKS))\.ipynb$$'
	$(PYTEST) -m fast -n 2 --dist loadfile $(COVERAGE)

test-rest: .venv/.ready  # what `make test` leaves out; a GPU's tests skip without one
	$(NOTEBOOKS) --flags slow --skip_folder_re '^[_.]|^results$$' --file_re '^($(SLOW_NOTEBOOKS))\.ipynb$$'
	$(PYTEST) -m "not fast" $(COVERAGE)  # one after another: they start processes of their own, and two workers took as long

test-all: test test-rest  ## run everything: also slow tests, Slurm, browser, mounts (see test-system-deps)

test-system-deps:  ## install the Debian packages of the system tests, as root
	apt-get update -qq
	DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends chromium fonts-dejavu-core slurm-wlm munge

lint: .venv/.ready  ## look for faults without running anything: ruff, and ty for types
	$(BIN)/ruff check ctxnb docs tests bench
	$(BIN)/ty check ctxnb --python .venv

gpu-bundle: .venv/.ready  ## gather in gpu-bundle/ what `bash bench/gpu_pass.sh gpu-bundle OUT` needs on a bare GPU machine
	$(BIN)/python bench/gpu_bundle.py gpu-bundle

# The same steps on this CPU at tiny sizes, in at most 3 minutes of an idle machine with two cores.
gpu-rehearsal: .venv/.ready  # tests/test_pass.py runs it too
	$(BIN)/python bench/gpu_bundle.py gpu-bundle-rehearsal --no-wheels --no-data
	PYTHON=$(BIN)/python bash bench/gpu_pass.sh gpu-bundle-rehearsal gpu-out-rehearsal 420 --rehearse
	@rm -rf gpu-bundle-rehearsal gpu-out-rehearsal

gpu-collect: .venv/.ready  ## put what a pass brought back (OUT=folder) into data/results, to be committed
	$(BIN)/python bench/gpu_collect.py $(OUT)

golden: .venv/.ready  ## run a small cell of each template and write its losses to tests/golden, after a new recipe
	$(BIN)/python tests/golden_cells.py write

export: .venv/.ready  ## write ctxnb/*.py and README.md from the notebooks, and clean the notebooks
	$(BIN)/nbdev_export
	$(BIN)/nbdev_clean
	@$(MAKE) --no-print-directory readme

# After a table has changed: the scorecard computes every finding, the front page quotes it.
scorecard: .venv/.ready
	cd nbs/about && OMP_NUM_THREADS=1 ../../$(BIN)/jupyter nbconvert --log-level=ERROR --to notebook --execute --inplace claims.ipynb
	cd nbs && OMP_NUM_THREADS=1 ../$(BIN)/jupyter nbconvert --log-level=ERROR --to notebook --execute --inplace index.ipynb
	@$(BIN)/nbdev_clean
	@$(MAKE) --no-print-directory readme

# The code of the index is for the page; links in it are relative to nbs/.
readme: .venv/.ready
	@$(BIN)/jupyter nbconvert --log-level=ERROR --to markdown --no-input --output-dir . --output README \
	  --NbConvertApp.output_files_dir=docs/readme nbs/index.ipynb
	@sed -i -E 's#\]\(([a-z_/]+\.ipynb)\)#](nbs/\1)#g; s#!\[png\]#![Loss against context length, a curve for each amount of training data; the minimum moves right with more data]#' README.md

check: .venv/.ready  ## fail on export drift, uncleaned notebooks, notebooks over 300 kB, a template with other defaults and its old recipe
	@$(MAKE) --no-print-directory export
	@git diff --exit-code --stat || { echo "the notebooks and what is made from them differ: run make export, commit"; exit 1; }
	@! find nbs -name '*.ipynb' -not -path '*/.ipynb_checkpoints/*' -size +300k | grep . || { echo "is over 300 kB: clear or shrink its outputs"; exit 1; }
	@$(BIN)/python tests/golden_cells.py check
