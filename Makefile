# `make demo` and `make test` need Python 3.10 or later and nothing else: they make their own
# virtual environment. A C++ compiler is used where there is one.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
SOURCES := pyproject.toml setup.py $(wildcard csrc/*)
CPP := $(wildcard csrc/*.cpp csrc/*.hpp)

.DEFAULT_GOAL := help
.PHONY: help demo test sanitize lint typecheck format bench clean

help:  ## list the commands
	@sed -n 's/^\([a-z]*\):[^#]*## \(.*\)/make \1|\2/p' $(firstword $(MAKEFILE_LIST)) \
		| awk -F'|' '{ printf "%-16s %s\n", $$1, $$2 }'

demo: $(VENV)/.installed  ## steer the packaged model with its guides, side by side
	@$(BIN)/fastguide demo

test: $(VENV)/.installed-test  ## run the whole test-suite, slow tests included
	@$(BIN)/pytest --numprocesses auto --dist worksteal

# The sanitized extension comes first on the path, before the editable installation's.
sanitize: $(VENV)/.installed-test  ## run the tests of the C++ ops with sanitizers
	FASTGUIDE_REQUIRE_NATIVE=1 FASTGUIDE_SANITIZE=1 $(BIN)/python setup.py --quiet build \
		--build-base build/sanitize --build-lib build/sanitize/lib
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" \
		ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
		PYTHONPATH=build/sanitize/lib $(BIN)/pytest -p no:cacheprovider tests/kernels \
		tests/models/test_packing.py -k 'native or test_packing'

lint: $(VENV)/.installed-dev  ## check style and types of Python and C++
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/clang-format --dry-run -Werror $(CPP)
	@$(MAKE) --no-print-directory typecheck

# fastguide.kernels is mapped from kernels/, which mypy cannot know: show it a tree of links.
typecheck: $(VENV)/.installed-dev  ## check types only
	@rm -rf build/typecheck && mkdir -p build/typecheck/fastguide
	@ln -s "$(CURDIR)"/fastguide/* "$(CURDIR)"/kernels build/typecheck/fastguide/
	cd build/typecheck && "$(abspath $(BIN))/mypy" --config-file "$(CURDIR)/pyproject.toml" \
		--cache-dir "$(CURDIR)/.mypy_cache" -p fastguide

format: $(VENV)/.installed-dev  ## format Python and C++, mend what can be mended
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(CPP)

bench: $(VENV)/.installed-bench  ## time guided against unguided decoding
	@$(BIN)/python benchmarks/bench_engine.py

clean:  ## remove what was built; the virtual environment stays
	rm -rf build dist *.egg-info fastguide/_C*.so fastguide/_C*.pyd
	rm -rf .pytest_cache .ruff_cache .mypy_cache .hypothesis
	rm -f $(VENV)/.installed*
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

# A marker tells that an installation is up to date with the files that decide it.
$(VENV)/.installed: $(SOURCES) | $(VENV)/.created
	$(BIN)/python -m pip install --editable .
	@touch $@

$(VENV)/.installed-%: $(SOURCES) | $(VENV)/.created
	$(BIN)/python -m pip install --editable '.[$*]'
	@touch $@ $(VENV)/.installed

$(VENV)/.created:
	@$(PYTHON) -c 'import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 10))' 2>/dev/null \
		|| { echo "fastguide needs Python 3.10 or later with its venv module; '$(PYTHON)' is not" \
		"one: install it, or name another with 'make PYTHON=...'." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	@touch $@
