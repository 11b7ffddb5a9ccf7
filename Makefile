# make train       all the main job needs (virtual environment, requirements, data), then the job: runs/fashion_mnist
# make test        the same set-up, then the tests
# make test-hosts  jobs on several hosts, signalled, killed or with a sharded state: minutes each, on a quiet machine
# make test-long   those that continuous integration leaves out (tests/long.py), with PyTorch and diffusers
# make test-slow   those that take long: processes that are killed or run in parallel, whole experiments and commands
# make check       ruff's rules and format
# make count       the lines of the package and of its core, its longest function and file
# make parity      the tests against PyTorch and diffusers, and those with libtpu, in a virtual environment of their own
# make emoji       text to image from nothing: the same set-up, the emoji, then configs/emoji.py: runs/emoji
# make experiments the results of experiments/, and its tables written again
# make data        Fashion-MNIST from its Debian package, where apt is at hand
# make emoji-data  the emoji's font and names from their Debian packages, likewise
# make clean       removes the virtual environments and the caches; data/ and runs/ stay
#
# More flags for the command behind:  make train ARGS="--workdir=runs/other --config.seed=1"
# Another Python than python3:        make train PYTHON=/path/to/python3.12

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.ONESHELL:
.DEFAULT_GOAL := help
.PHONY: help train test test-slow test-long test-hosts check count parity emoji experiments data emoji-data clean

ARGS ?=
NEW_ENOUGH := -c 'import sys; sys.exit(sys.version_info < (3, 11))'
ifndef PYTHON
PYTHON := $(shell for python in python3 python3.13 python3.12 python3.11; do \
	$$python $(NEW_ENOUGH) 2>/dev/null && echo $$python && exit; done; echo python3)
endif
REQUIREMENTS := $(wildcard requirements.txt requirements-dev.txt)
IDX_FILES := usr/share/datasets/fashion-mnist
INSTALLED := /$(IDX_FILES)
EMOJI_FONT := usr/share/fonts/truetype/noto/NotoColorEmoji.ttf
EMOJI_NAMES := usr/share/unicode/emoji/emoji-test.txt
SYSTEM := /
# Processes of the tests, each of up to 4 GB of memory: one more than two cores, as some tests wait for other processes.
# On a larger machine:  make test WORKERS=8
WORKERS := 3
IN_WORKERS := --numprocesses=$(WORKERS) --dist=loadfile --no-loadscope-reorder
# glibc's memory in huge pages: on a CPU a training step makes and drops many arrays.
train emoji: export GLIBC_TUNABLES := glibc.malloc.hugetlb=1
# Python compiles what is imported, when it is: half of what there is never is. It keeps that for the next process,
# also where the environment says that it should not: else each start takes seconds longer.
export PYTHONDONTWRITEBYTECODE :=
QUIETLY := --quiet --disable-pip-version-check --no-compile

help:
	@sed -n 's/^# \?//p; /^$$/q' Makefile

train: .venv/ready data
	@.venv/bin/python -m ldm_jax.train --config=configs/fashion_mnist.py $(ARGS)

test: .venv/ready data emoji-data
	@.venv/bin/python -m pytest $(IN_WORKERS) -rs $(ARGS)

test-slow: .venv/ready data emoji-data
	@.venv/bin/python -m pytest $(IN_WORKERS) -rs -m 'slow and not hosts' $(ARGS)

test-long: .venv-parity/ready data emoji-data
	@.venv-parity/bin/python -m pytest $(IN_WORKERS) -rs -m 'long and not hosts' tests tests/parity $(ARGS)

test-hosts: .venv/ready data
	@.venv/bin/python -m pytest -rs -m hosts $(ARGS)

check: .venv/ready
	@.venv/bin/python -m ruff check .
	.venv/bin/python -m ruff format --check .

count:
	@$(PYTHON) .ci/count

# PyTorch's threads wait busily for each other.
parity: export OMP_NUM_THREADS := 1
parity: .venv-parity/ready
	@export JAX_PLATFORMS=cpu
	.venv-parity/bin/python -m pytest $(IN_WORKERS) tests/parity $(ARGS)
	.venv-parity/bin/python -m pytest -m 'slow or not slow' -k 'topology or slice' tests/runtime/test_topology.py \
		tests/training/test_compile_report.py tests/models/test_flash_attention.py

emoji: .venv/ready emoji-data
	@.venv/bin/python -m ldm_jax.train --config=configs/emoji.py $(ARGS)

experiments: .venv/ready
	@.venv/bin/python -m experiments.index

# The program downloads what isn't here, so that a failure is no error. The folder appears whole, by its renaming.
data:
	@$(functions)
	[ -e data/$(IDX_FILES) ] || [ -e $(INSTALLED) ] || [ -e data/fashion_mnist/1.0.0 ] || {
		unpack_package dataset-fashion-mnist data/package &&
		mkdir -p data/$(dir $(IDX_FILES)) &&
		mv data/package/$(IDX_FILES) data/$(IDX_FILES)
	} || echo "No Debian package to be had here: the program will download Fashion-MNIST itself."
	rm -rf data/package

# A missing file is told by the program, and by the tests that need it; it cannot be downloaded otherwise.
emoji-data:
	@$(functions)
	fetch() {
		[ -e data/$$2 ] || [ -e $(SYSTEM)/$$2 ] || {
			unpack_package $$1 data/emoji-package &&
			mkdir -p data/$${2%/*} &&
			mv data/emoji-package/$$2 data/$$2
		} || echo "No Debian package to be had here: put $${2##*/} in data/$${2%/*} for the emoji."
		rm -rf data/emoji-package
	}
	fetch fonts-noto-color-emoji $(EMOJI_FONT)
	fetch unicode-data $(EMOJI_NAMES)

clean:
	@rm -rf .venv .venv-parity .pytest_cache .ruff_cache .hypothesis

# The stamp `ready`: pip runs again when the requirements have changed, and only then.
.venv/ready: $(REQUIREMENTS)
	@$(functions)
	make_venv .venv
	echo "Installing $(REQUIREMENTS) into .venv ..."
	.venv/bin/python -m pip install $(QUIETLY) $(REQUIREMENTS:%=-r %)
	touch $@

# torch first and by exact version: the index then offers the plain build. The program itself needs none of these.
.venv-parity/ready: $(REQUIREMENTS)
	@$(functions)
	make_venv .venv-parity
	echo "Installing torch, diffusers, transformers, peft, libtpu and $(REQUIREMENTS) into .venv-parity ..."
	pip() { .venv-parity/bin/python -m pip install $(QUIETLY) "$$@"; }
	pip torch==2.13.0
	pip torch==2.13.0 diffusers==0.42.1 transformers==5.23.0 peft==0.21.2 'jax[tpu]' $(REQUIREMENTS:%=-r %)
	pip --no-deps torch-fidelity==0.4.0
	touch $@

define functions
fail() { echo "error: $$*" >&2; exit 2; }

# make_venv FOLDER: a virtual environment with pip, made anew if the one there does not work.
make_venv() {
	$(PYTHON) $(NEW_ENOUGH) 2>/dev/null || fail "Python 3.11 or newer is needed, and $(PYTHON) is" \
		"$$($(PYTHON) -V 2>/dev/null || echo not there); install it, or say where it is: make PYTHON=/path/to/python3"
	! $$1/bin/python -m pip --version >/dev/null 2>&1 || return 0
	echo "Making the virtual environment $$1 ..."
	rm -rf $$1
	! $(PYTHON) -m venv $$1 >/dev/null 2>&1 || return 0
	# Debian keeps ensurepip in a package of its own; the wheel of pip does as well.
	local wheels=data/pip/usr/share/python-wheels
	{
		$(PYTHON) -m venv --clear --without-pip $$1 &&
		unpack_package python3-pip-whl data/pip &&
		$$1/bin/python $$(echo $$wheels/pip-*.whl)/pip install --quiet --no-index $$wheels/pip-*.whl
	} >/dev/null 2>&1 || {
		rm -rf $$1
		fail "$(PYTHON) cannot make a virtual environment; on Debian and Ubuntu: sudo apt install python3-venv"
	}
	rm -rf data/pip
}

# unpack_package NAME FOLDER: a Debian package's files, without root, by apt's package lists or, if they are missing or
# out of date, by lists of our own.
unpack_package() {
	command -v apt-get >/dev/null && command -v dpkg >/dev/null || return 1
	echo "Fetching the Debian package $$1 ..."
	rm -rf $$2 && mkdir -p $$2/apt/lists/partial || return 1
	local own_lists=(-o "Dir::State::Lists=$$PWD/$$2/apt/lists" -o "Dir::Cache=$$PWD/$$2/apt")
	(
		cd $$2/apt
		apt() { apt-get -qq -o "APT::Sandbox::User=$$(id -un)" -o Acquire::http::Timeout=20 "$$@"; }
		apt download $$1 || { apt "$${own_lists[@]}" update && apt "$${own_lists[@]}" download $$1; }
	) >/dev/null 2>&1 && dpkg -x $$2/apt/$$1_*.deb $$2 && rm -r $$2/apt
}
endef
