# Everything runs in .venv, which is set up by itself: with uv where it is installed, otherwise with python3's own venv.
# PYTHON=python3.12 chooses another interpreter; PIP_INDEX_URL (or UV_INDEX_URL) another package index. TESTS_AT_ONCE=8 suits more cores.

PYTHON ?= python3
VENV   := .venv
RUN    := $(VENV)/bin/python
TESTS_AT_ONCE ?= 2

.PHONY: demo test drill quality format clean

demo: $(VENV)/ready  ## corpus, pretraining, fine-tuning, one table: 15 minutes on two cores
	$(RUN) demo.py

test: $(VENV)/ready
	$(RUN) -m pytest -m "not slow" -n $(TESTS_AT_ONCE) --dist loadfile --no-loadscope-reorder

drill: $(VENV)/ready  ## what docs/training.md promises: slow tests, 20 kills in one run, other numbers of processes, 10,000 resumes
	$(RUN) -m pytest -m slow
	$(RUN) benchmarks/crash_drill.py --kills 20
	$(RUN) benchmarks/crash_drill.py --world_sizes 2 1 2
	$(RUN) benchmarks/soak.py --resumes 10000

quality: $(VENV)/ready
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

format: $(VENV)/ready
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache runs/demo data/demo
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch comes first and pinned: a looser request may bring another build.
$(VENV)/ready: setup.cfg constraints.txt pyproject.toml
	@if command -v uv >/dev/null 2>&1; then \
	    uv venv --clear --python $(PYTHON) $(VENV) && \
	    uv pip install --python $(VENV) -c constraints.txt torch && \
	    uv pip install --python $(VENV) -c constraints.txt -e '.[test]'; \
	else \
	    $(PYTHON) -m venv --clear $(VENV) || { \
	        echo "$(PYTHON) cannot make a virtual environment: on Debian or Ubuntu install python3-venv, or install uv" >&2; exit 1; }; \
	    $(VENV)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt torch && \
	    $(VENV)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'; \
	fi
	@touch $@
