# stackbench: two commands. `make bench` measures, `make test` tests; both set up what they need.
#
#   PIP_ARGS     options passed to every pip call: a mirror, a wheel folder
#   PYTHON       the interpreter for .venv: 3.11, 3.12 or 3.13 (default: the newest found)
#   SUITE, OUT   what `make bench` runs, and where the results go
#   PYTEST_ARGS  more options for pytest, such as -k NAME

PIP_ARGS ?=
PYTHON ?=
SUITE ?= quick
OUT ?= results/local/$(shell date -u +%Y-%m-%dT%H%M%SZ)
PYTEST_ARGS ?=

# Through the environment, so that quotes in them survive.
export PIP_ARGS PYTHON
BOOTSTRAP = python3 -m bench.bootstrap
SETUP_ARGS = --python="$$PYTHON" --pip-args="$$PIP_ARGS"
DEV = .venvs/dev/bin/python
S3 = .venvs/s3/bin/s3s-fs
# In the Rust workspace, where there is cargo; elsewhere the extension is left out, and said.
RUST = command -v cargo >/dev/null || { echo "no cargo: Rust is left out"; exit 0; }; cd stacks/native &&

.DEFAULT_GOAL := help
.PHONY: help bench test lint setup setup-dev setup-peers setup-s3 locks clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "variables: PIP_ARGS=… PYTHON=… SUITE=$(SUITE) OUT=… PYTEST_ARGS=…  (see the head of the Makefile)"

# A failed case still gets its report; the exit code is the run's.
bench: setup  ## run SUITE, print the result table and the path of the HTML report
	@out='$(OUT)'; code=0; \
	.venv/bin/stackbench run '$(SUITE)' --out "$$out" || code=$$?; \
	if [ -e "$$out/plan.json" ]; then .venv/bin/stackbench report "$$out" || [ $$code -ne 0 ] || code=$$?; fi; \
	exit $$code

# Rust's tests first: they need no environment, and pytest's summary is the last word.
test: setup-dev setup-peers setup-s3  ## run every test
	@$(RUST) STACKBENCH_S3_SERVER="$(CURDIR)/$(S3)" cargo test --release --locked --quiet
	$(DEV) -m pytest -n 2 --dist loadgroup -q $(PYTEST_ARGS)

lint: setup-dev  ## ruff and mypy; rustfmt and clippy
	$(DEV) -m ruff check .
	$(DEV) -m ruff format --check .
	$(DEV) -m mypy --strict bench
	@$(RUST) cargo fmt --all --check
	@$(RUST) cargo clippy --release --locked --quiet --all-targets -- -D warnings

setup:  ## make .venv: the timed environment
	@$(BOOTSTRAP) timed $(SETUP_ARGS)

setup-dev:  ## make .venvs/dev: test tools, layered on .venv
	@$(BOOTSTRAP) dev $(SETUP_ARGS)

setup-peers:  ## make .venvs/peers…: the loaders that others wrote, layered on .venv
	@$(BOOTSTRAP) peers $(SETUP_ARGS)

# A real S3 server for the tests of stores: built once; where it cannot be, those tests say so and skip.
setup-s3: $(S3)  ## build the S3 server that the Rust tests use

$(S3):
	@command -v cargo >/dev/null || exit 0; echo "set-up: building an S3 server for the tests: about 3 minutes"; \
	cargo install --quiet s3s-fs@0.14.1 --locked --features binary --debug --root .venvs/s3 \
	|| echo "set-up: going on without an S3 server: its tests skip"

locks:  ## resolve locks/*.in again, with hashes and download sizes
	@$(BOOTSTRAP) locks $(SETUP_ARGS)

clean:  ## remove environments, build artefacts and caches; results stay
	rm -rf .venv .venvs build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	rm -rf stacks/native/target
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
