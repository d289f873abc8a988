# Each target does its own set-up: `make demo` and `make test` work on a fresh machine with
# Python 3.11 – 3.13 and make.

# The first Python on the path of version 3.$(1) to 3.13.
python_from = $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(not (3, $(1)) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null && \
	echo $$p && break; done)
PYTHON ?= $(call python_from,11)
RUN := .venv/bin/python
TORCH_INDEX ?=  # index of PyTorch's CPU build, where the default index serves only CUDA builds
PIP := -m pip --disable-pip-version-check --quiet

# glibc: keep freed memory in the process. By default large temporaries go back to the system and are
# faulted in again at every step; a training step of the demo's net took 85 ms instead of 65.
export MALLOC_MMAP_MAX_ = 0
export MALLOC_TRIM_THRESHOLD_ = 68719476736
export MALLOC_TOP_PAD_ = 67108864

.PHONY: demo test test-next test-interop bench-gradients bench-draws bench-store bench-curvature \
	bench-trak bench-plan bench-lds bench-retrain bench-autoencoder docs notebooks truths lint lock \
	clean

# Train, sample, fit curvature, attribute and report on scikit-learn's digits.
demo: .venv/installed
	$(RUN) -m jaxinf all --config=configs/digits.py --workdir=runs/digits

# Two files at a time: compiling, most of the work, keeps one core busy. tests/conftest.py orders them.
test: .venv/installed
	$(RUN) -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# The same tests on a newer JAX and kfac-jax's main branch, which is not on PyPI: KFAC_JAX=PATH takes
# a checkout of it, ARGS=tests/core some of the tests. This JAX needs Python 3.12 (PYTHON_NEXT=PATH)
# and another Flax than the locked one.
KFAC_JAX ?= git+https://github.com/google-deepmind/kfac-jax
PYTHON_NEXT ?= $(call python_from,12)
NEXT := jax==0.11.2 jaxlib==0.11.2 flax==0.12.12

test-next: .venv-next/installed
	.venv-next/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

# Parity with diffusers and embeddings by transformers' CLIP, in an environment of its own.
test-interop: .venv-interop/installed
	.venv-interop/bin/python -m pytest tests/interop

# Training gradients and scores against plain training steps, and a store's queries against the
# machine's memory; ARGS="--work=FOLDER" as for bench-curvature.
bench-gradients: .venv/installed
	$(RUN) -m tests.benchmarks.gradients $(ARGS)

# Noise of scores by design of draws, and size and accuracy of stores, on the digits run of `make demo`.
bench-draws: .venv/installed
	$(RUN) -m tests.benchmarks.draws $(ARGS)

bench-store: .venv/installed
	$(RUN) -m tests.benchmarks.stores $(ARGS)

# Fitting curvature against plain training steps, by batch and in whole; ARGS="--work=FOLDER" puts the
# result beside those of other programs on the same network and pairs.
bench-curvature: .venv/installed
	$(RUN) -m tests.benchmarks.curvature $(ARGS)

# TRAK features against plain training steps; ARGS="--work=FOLDER" as above, beside traker.
bench-trak: .venv/installed
	$(RUN) -m tests.benchmarks.trak $(ARGS)

# What `jaxinf plan` says of the stages on digits, and what they then take.
bench-plan: .venv/installed
	$(RUN) -m tests.benchmarks.planning $(ARGS)

# The proof by retraining: LDS of every method. It goes on from the run's folder, or at first from the
# committed results, of which it repeats the scores alone. LDS=digits_unet for the U-Net, or any config.
LDS ?= digits_mlp
LDS_RUN = --config=configs/$(LDS).py --workdir=runs/$(LDS) $(ARGS)

bench-lds: .venv/installed
	@mkdir -p runs
	@test -e runs/$(LDS) -o ! -e docs/results/$(LDS) || cp -r docs/results/$(LDS) runs/$(LDS)
	$(RUN) -m jaxinf benchmark $(LDS_RUN)
	$(RUN) -m jaxinf study lds $(LDS_RUN)

# Puts the truth of a finished run into the package, and all of them on their page. The run is that of
# bench-lds (TRUTH=digits_unet, or any config; WORK= its folder); missing scores are computed.
TRUTH ?= digits_mlp
WORK ?= runs/$(TRUTH)

truths: .venv/installed
	@mkdir -p runs jaxinf/truths/$(TRUTH)
	@test -e $(WORK) -o ! -e docs/results/$(TRUTH) || cp -r docs/results/$(TRUTH) $(WORK)
	$(RUN) -m jaxinf truth --config=configs/$(TRUTH).py --workdir=$(WORK) \
		--config.measure.measurements="('loss', 'elbo')" $(ARGS)
	cp $(WORK)/truth/arrays.npz $(WORK)/truth/manifest.json jaxinf/truths/$(TRUTH)/
	sed '/^<!-- tables/q' docs/leaderboard.md > runs/leaderboard.md
	$(RUN) -m jaxinf evaluate --truth=all >> runs/leaderboard.md
	mv runs/leaderboard.md docs/leaderboard.md

# Retraining against a minimal training loop: steps a second and models an hour, by models at once.
bench-retrain: .venv/installed
	$(RUN) -m tests.benchmarks.retraining $(ARGS)

# Encoding images with Stable Diffusion's autoencoder, by images a second and memory, beside diffusers;
# ARGS="--size=256 --decode" for larger ones, and decoding.
bench-autoencoder: .venv-interop/installed
	.venv-interop/bin/python -m tests.benchmarks.autoencoder $(ARGS)

# The documentation as a site in site/, which opens from its files: no server, and nothing from
# elsewhere. Any warning, a broken link or a docstring that cannot be read, is an error.
docs: .venv-docs/installed
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/python -m mkdocs build --strict --quiet
	@! grep -rlE '<(script|img|iframe)[^>]* src="?https?:|<link[^>]*stylesheet[^>]* href="?https?:' \
		--include='*.html' site || { echo "these pages load something from elsewhere" >&2; exit 1; }
	@echo "site/index.html"

# Executes the notebooks and writes their outputs, pictures too; NOTEBOOKS= some of them.
NOTEBOOKS ?= $(wildcard notebooks/*.ipynb)

notebooks: .venv-notebooks/installed
	.venv-notebooks/bin/python notebooks/run.py $(NOTEBOOKS)

lint: .venv/installed
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

# Pins the newest versions that setup.cfg allows, for every supported Python; pre-commit has the
# locked ruff.
lock:
	$(PYTHON) -m venv .venv-lock
	.venv-lock/bin/python $(PIP) install uv
	.venv-lock/bin/uv pip compile --quiet --universal --python-version 3.11 --extra test \
		--no-annotate --no-header --output-file requirements.lock setup.cfg
	sed -i.old "s/rev: v.*/rev: v$$(sed -n 's/^ruff==//p' requirements.lock)/" .pre-commit-config.yaml
	rm .pre-commit-config.yaml.old
	sed -n '/^docs =$$/,/^[a-z]/s/^  //p' setup.cfg | .venv-lock/bin/uv pip compile --quiet --universal \
		--python-version 3.11 --no-annotate --no-header --output-file docs/requirements.lock -

clean:
	rm -rf .venv .venv-docs .venv-notebooks .venv-next .venv-interop .venv-lock .pytest_cache runs \
		build site *.egg-info

.venv/installed: requirements.lock setup.cfg
	@test -n "$(PYTHON)" || { echo "jaxinf needs Python 3.11, 3.12 or 3.13" >&2; exit 1; }
	@echo "Installing the locked dependencies into .venv …"
	$(PYTHON) -m venv .venv
	$(RUN) $(PIP) install --no-deps -r requirements.lock
	$(RUN) $(PIP) install --no-deps --no-build-isolation --editable .
	@touch $@

.venv-docs/installed: docs/requirements.lock
	@test -n "$(PYTHON)" || { echo "the documentation needs Python 3.11, 3.12 or 3.13" >&2; exit 1; }
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python $(PIP) install --no-deps -r docs/requirements.lock
	@touch $@

.venv-notebooks/installed: requirements.lock setup.cfg
	@test -n "$(PYTHON)" || { echo "jaxinf needs Python 3.11, 3.12 or 3.13" >&2; exit 1; }
	$(PYTHON) -m venv .venv-notebooks
	.venv-notebooks/bin/python $(PIP) install --no-deps -r requirements.lock
	.venv-notebooks/bin/python $(PIP) install --constraint requirements.lock \
		equinox==0.13.8 ipykernel==7.4.0 nbclient==0.11.0 nbformat==5.11.1
	.venv-notebooks/bin/python $(PIP) install --no-deps --no-build-isolation --editable .
	@touch $@

.venv-next/installed: requirements.lock setup.cfg
	@test -n "$(PYTHON_NEXT)" || { echo "this JAX needs Python 3.12 or 3.13" >&2; exit 1; }
	@echo "Installing a newer JAX and kfac-jax's main branch into .venv-next …"
	$(PYTHON_NEXT) -m venv .venv-next
	grep -vE '^(jax|jaxlib|flax|kfac-jax)==' requirements.lock > .venv-next/requirements.lock
	.venv-next/bin/python $(PIP) install --no-deps -r .venv-next/requirements.lock $(NEXT) "$(KFAC_JAX)"
	.venv-next/bin/python $(PIP) install --no-deps --no-build-isolation --editable .
	@touch $@

.venv-interop/installed: requirements.lock setup.cfg
	@test -n "$(PYTHON)" || { echo "jaxinf needs Python 3.11, 3.12 or 3.13" >&2; exit 1; }
	$(PYTHON) -m venv .venv-interop
	.venv-interop/bin/python $(PIP) install $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch==2.13.0
	.venv-interop/bin/python $(PIP) install --no-deps -r requirements.lock
	.venv-interop/bin/python $(PIP) install diffusers==0.42.1 transformers==5.24.0
	.venv-interop/bin/python $(PIP) install --no-deps --no-build-isolation --editable .
	@touch $@
