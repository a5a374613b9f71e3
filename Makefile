# `make smoke` and `make test` are complete first commands on a machine with Python 3.11: each makes .venv when it is missing,
# unfinished, of another place, or of another lock.

# cpu or cuda: which build of torch .venv gets. `make smoke TORCH=cuda` overrules what is found here.
TORCH := $(if $(wildcard /proc/driver/nvidia/version /usr/lib/wsl/lib/libcuda.so*),cuda,cpu)
ifeq ($(filter cpu cuda,$(TORCH)),)
$(error TORCH=$(TORCH) is no build of torch: say TORCH=cpu or TORCH=cuda)
endif

# Where torch's CPU build is taken from when pip's find-links have none (macOS needs neither: its ordinary build is the CPU one).
TORCH_INDEX := https://download.pytorch.org/whl
TORCH_CPU_INDEX = $(TORCH_INDEX)/cpu

# The first Python 3.11 on the path; `make smoke PYTHON=/usr/local/bin/python3.11` names one.
PYTHON = $(shell for p in python3.11 python3 python; do \
    $$p -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null && echo $$p && break; done)

PIP := .venv/bin/python -m pip --disable-pip-version-check --quiet
LOCKED := --require-hashes --only-binary :all:

# What the image is called here, and which torch it gets: CUDA's unless the command line says TORCH=cpu or, for an older driver, CUDA=cu126.
IMAGE := gpt2-speedrun
TARGET := runtime
IMAGE_TORCH = $(or $(CUDA),$(if $(filter command,$(origin TORCH)),$(TORCH)),cuda)
BUILD = docker build --build-arg TORCH=$(IMAGE_TORCH) --build-arg REVISION=$(shell git rev-parse HEAD 2>/dev/null) \
    --build-arg SOURCE_DATE_EPOCH=$(shell git log -1 --format=%ct 2>/dev/null || echo 0) $(BUILD_FLAGS)

# The last thing that a finished environment gets is a file named after all that it was made from.
MADE_FROM := $(shell { cat requirements.lock requirements-cuda.lock; echo $(TORCH) "$(CURDIR)"; } | cksum | cut -d ' ' -f 1)
ENVIRONMENT := .venv/made-from-$(MADE_FROM)
PROJECT := .venv/project-installed
SKY := .sky-env/made-from-$(shell { cat tests/cluster/requirements.txt; echo "$(CURDIR)"; } 2>/dev/null | cksum | cut -d ' ' -f 1)

.PHONY: help smoke test slow chaos container cluster lint bench gpu image push compose lock sizes clean
.DELETE_ON_ERROR:

help: ## list these commands
	@sed -n 's/^\([a-z]*\):.*## /\1	/p' $(MAKEFILE_LIST) | expand -t 10

smoke: $(PROJECT) ## the whole pipeline on a CPU, in minutes; the report is in out/
	.venv/bin/speedrun smoke --fresh --out out

test: $(PROJECT) ## all tests but the slow ones
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -m "not slow" --numprocesses auto --maxprocesses 4 --dist loadfile

slow: chaos container cluster ## all slow tests: the next three

chaos: $(PROJECT) ## kill -9 everywhere, many processes and nodes, a faulty S3 server, real CORE items, compiled steps
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -m slow --ignore tests/container --ignore tests/cluster --numprocesses 2 --dist loadfile

container: $(PROJECT) ## the image in a real engine (root, Debian; minutes)
	.venv/bin/python -m pytest -m slow tests/container

cluster: $(PROJECT) $(SKY) ## SkyPilot on a local Slurm, with a real S3 server (root, Debian; minutes)
	.venv/bin/python -m pytest -m slow tests/cluster

lint: $(PROJECT) ## style and formatting
	.venv/bin/ruff check
	.venv/bin/ruff format --check

bench: $(PROJECT) ## tables of timings (tests/bench/bench_*.py)
	.venv/bin/python -m pytest tests/bench --override-ini "python_files=bench_*.py" --capture=no

gpu: $(PROJECT) ## what ten minutes of one GPU can say, into out/gpu (tests/gpu/run.py); skipped without one
	.venv/bin/python tests/gpu/run.py --out $(or $(OUT),out/gpu)

image: ## the container image; TORCH=cpu for one without CUDA
	$(BUILD) --target $(TARGET) --tag $(IMAGE) .

push: ## build it for SkyPilot and push it: make push IMAGE=ghcr.io/me/gpt2-speedrun:1
	@case '$(IMAGE)' in *YOUR-NAME*|*/you/*) false;; */*) ;; *) false;; esac \
	|| { echo "make: $(IMAGE) is no place to push to: say make push IMAGE=REGISTRY/NAME/gpt2-speedrun:TAG" >&2; exit 2; }
	$(BUILD) --target sky --tag $(IMAGE) .
	docker push $(IMAGE)

compose: ## the smoke in a container, its record in a real S3 server in another; the report is fetched to out/compose
	$(BUILD) --target runtime --tag $(IMAGE) .
	mkdir -p out/compose
	OWNER=$$(id -u) docker compose --file docker/compose.yaml run --rm --build fetch; \
	code=$$?; docker compose --file docker/compose.yaml down --volumes; exit $$code

clean: ## remove .venv and caches; out/ stays
	rm -rf .venv .sky-env .lock-env build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(PROJECT): $(ENVIRONMENT) pyproject.toml
	@$(PIP) install --no-deps --no-build-isolation --editable .
	@touch $@

# Torch comes first and alone, so that its CPU build is asked for in one place at a time; what is installed is not fetched again.
$(ENVIRONMENT):
	@test -n "$(PYTHON)" || { echo "make: Python 3.11 is needed and not on the path: install it, or say make PYTHON=/path/to/python3.11" >&2; exit 2; }
	@rm -f .venv/made-from-* # first of all: a half-removed environment must not be taken for a whole one
	rm -rf .venv
	$(PYTHON) -m venv .venv
	@lock=requirements$(if $(filter cuda,$(TORCH)),-cuda).lock; \
	if [ $(TORCH) = cpu ] && [ "$$(uname)" != Darwin ]; then \
	    sed -n '/^torch==/,/[^\\]$$/p' $$lock >.venv/torch.txt; \
	    echo "Installing torch's CPU build (about 200 MB)"; \
	    $(PIP) install $(LOCKED) --no-deps --no-index -r .venv/torch.txt 2>/dev/null \
	    || $(PIP) install $(LOCKED) --no-deps --retries 1 --timeout 15 --index-url $(TORCH_CPU_INDEX) -r .venv/torch.txt \
	    || { echo "No CPU build of torch in pip's find-links or at $(TORCH_CPU_INDEX): taking the CUDA build, which runs on a CPU too (2.7 GB)"; \
	         lock=requirements-cuda.lock; }; \
	fi; \
	echo "Installing $$lock"; \
	$(PIP) install $(LOCKED) -r $$lock
	@touch $@

# --- SkyPilot, for the tests of sky/: an environment of its own, since it needs an older click than wandb

$(SKY):
	$(PYTHON) -m venv --clear .sky-env
	sed -n '/^uv==/,/[^\\]$$/p' tests/cluster/requirements.txt >.sky-env/uv.txt
	.sky-env/bin/python -m pip --disable-pip-version-check --quiet install $(LOCKED) -r .sky-env/uv.txt
	.sky-env/bin/uv pip install --quiet --python .sky-env/bin/python --require-hashes -r tests/cluster/requirements.txt
	@touch $@

# --- the locks: one for CPU machines, one for CUDA, from pyproject.toml; `make lock UPGRADE=--upgrade` takes newer versions
#
# The CUDA lock is what PyPI's torch needs on Linux. The CPU lock is what the same versions need where torch has no CUDA (macOS);
# its torch is the CPU builds, whose hashes are listed here because the package index knows only one of them.
UV_VERSION := 0.13.9
COMPILE := .lock-env/bin/uv --no-config pip compile --quiet --python-version 3.11 --only-binary :all: --generate-hashes \
    --no-emit-index-url --no-emit-find-links --custom-compile-command "make lock" $(UPGRADE)
UV := $(COMPILE) pyproject.toml --extra dev
TORCH_VERSION := 2.13.0
TORCH_CPU_HASHES := \
    6746dbcbeb526eb61330b76b41ff1b4eb848951103a892eeb080dfa2b264667b \
    84453b69508ec79902f899c5ed9495acb9e2bbe9fda5f1d5d6f19e3c3842e1a7 \
    e76f9bcecc52b8ff711239a2f7547d5353df95878ab232f0773c1d95928b92f8
# in this order: Linux x86_64 and Linux aarch64 (2.13.0+cpu), macOS arm64; Python 3.11

lock: ## make the locks from pyproject.toml and SkyPilot's; CUDA=cu126 makes the one for torch's builds of that generation
	$(PYTHON) -m venv --clear .lock-env
	.lock-env/bin/python -m pip install --quiet uv==$(UV_VERSION) packaging
	.lock-env/bin/uv --no-config pip compile --quiet tests/cluster/requirements.in --python-version 3.11 --generate-hashes --no-emit-index-url \
	    --no-emit-find-links --custom-compile-command "make lock" $(UPGRADE) --output-file tests/cluster/requirements.txt
	$(UV) --extra attention --python-platform x86_64-manylinux_2_28 --output-file requirements-cuda.lock
	MACOSX_DEPLOYMENT_TARGET=14.0 $(UV) --python-platform aarch64-apple-darwin --constraints requirements-cuda.lock --no-emit-package torch --output-file requirements.lock
	printf '%s\n' '# but stands here, with the hashes of its CPU builds:' 'torch==$(TORCH_VERSION) \' >>requirements.lock
	printf '    --hash=sha256:%s \\\n' $(TORCH_CPU_HASHES) | sed '$$s/ .$$//' >>requirements.lock
	$(COMPILE) tests/container/requirements.in --python-platform x86_64-manylinux_2_28 --output-file tests/container/requirements.txt
ifdef CUDA
	echo 'torch==$(TORCH_VERSION)+$(CUDA)' >.lock-env/torch.in
	$(UV) --extra attention --python-platform x86_64-manylinux_2_28 --index $(TORCH_INDEX)/$(CUDA) --index-strategy unsafe-best-match \
	    --constraints .lock-env/torch.in --constraints requirements.lock --output-file requirements-$(CUDA).lock
endif

sizes: ## what the wheels of the CUDA image weigh, packed
	test -x .lock-env/bin/uv || { $(PYTHON) -m venv .lock-env && .lock-env/bin/python -m pip install --quiet uv==$(UV_VERSION) packaging; }
	$(PYTHON) docker/runtime_lock.py pyproject.toml requirements-cuda.lock >.lock-env/runtime.txt
	.lock-env/bin/uv --no-config pip compile --quiet .lock-env/runtime.txt --no-deps --python-version 3.11 --only-binary :all: \
	    --python-platform x86_64-manylinux_2_28 --format pylock.toml --output-file .lock-env/pylock.toml
	.lock-env/bin/python docker/wheel_sizes.py .lock-env/pylock.toml
