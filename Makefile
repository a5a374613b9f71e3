# `make smoke` and `make test` are complete first commands on a machine with Python 3.11, 3.12 or 3.13: each makes .venv
# when it is missing, unfinished, of another place, of another lock, or of another Python than PYTHON=... names.

# cpu or cuda: which build of torch .venv gets. `make smoke TORCH=cuda` overrules what is found here.
TORCH := $(if $(wildcard /proc/driver/nvidia/version /usr/lib/wsl/lib/libcuda.so*),cuda,cpu)
ifeq ($(filter cpu cuda,$(TORCH)),)
$(error TORCH=$(TORCH) is no build of torch: say TORCH=cpu or TORCH=cuda)
endif

# Where torch's CPU build is taken from when pip's find-links have none (macOS's ordinary build is the CPU one).
TORCH_INDEX := https://download.pytorch.org/whl
TORCH_CPU_INDEX = $(TORCH_INDEX)/cpu

# The newest Python on the path that the lock has hashes for ("# Python: ..." in it) and that can make environments
# (Debian's needs python3-venv); `make smoke PYTHON=/usr/local/bin/python3.12` names one.
LOCK := requirements$(if $(filter cuda,$(TORCH)),-cuda).lock
LOCKED_PYTHONS := $(shell sed -n 's/^# Python: //p' $(LOCK))
VERSION = import ensurepip, sys; print("%d.%d" % sys.version_info[:2])
PYTHON = $(shell for p in $$(printf 'python%s\n' $(LOCKED_PYTHONS) | sort -rn -t. -k2) python3 python; do \
    case " $(LOCKED_PYTHONS) " in (*" $$($$p -c '$(VERSION)' 2>/dev/null) "*) echo $$p; break;; esac; done)

PIP := .venv/bin/python -m pip --disable-pip-version-check --quiet
LOCKED := --require-hashes --only-binary :all:

# What the image is called here, and which torch it gets: CUDA's unless the command line says TORCH=cpu or, for an older
# driver, CUDA=cu126.
IMAGE := gpt2-speedrun
TARGET := runtime
IMAGE_TORCH = $(or $(CUDA),$(if $(filter command,$(origin TORCH)),$(TORCH)),cuda)
BUILD = docker build --build-arg TORCH=$(IMAGE_TORCH) \
    --build-arg IMAGE=$(IMAGE) --build-arg REVISION=$(shell git rev-parse HEAD 2>/dev/null) \
    --build-arg SOURCE_DATE_EPOCH=$(shell git log -1 --format=%ct 2>/dev/null || echo 0) $(if $(COMPAT),--build-context compat=$(COMPAT)) $(BUILD_FLAGS)

# The last thing that a finished environment gets is a file named after all that it was made from.
MADE_FROM := $(shell { cat requirements.lock requirements-cuda.lock; echo $(TORCH) "$(CURDIR)"; } | cksum | cut -d" " -f1)
ENVIRONMENT := .venv/made-from-$(MADE_FROM)
PROJECT := .venv/project-installed
HF := .venv/hf-installed
ifeq ($(origin PYTHON),command line)
ifneq ($(shell $(PYTHON) -c '$(VERSION)'),$(shell .venv/bin/python -c '$(VERSION)' 2>/dev/null))
.PHONY: $(ENVIRONMENT)
endif
endif
SKY := .sky-env/made-from-$(shell \
    { cat tests/cluster/requirements.txt; echo "$(CURDIR)"; } 2>/dev/null | cksum | cut -d" " -f1)

# Files as tests/conftest.py orders them. Hundreds of processes of one program: its bytecode is kept, whatever the
# environment says.
BY_FILE := --dist loadfile --no-loadscope-reorder
export PYTHONDONTWRITEBYTECODE :=

.PHONY: help hf smoke test slow chaos services container cluster byhand lint docs bench gpu image push compose lock sizes clean
.DELETE_ON_ERROR:

help: ## list these commands
	@sed -n 's/^\([a-z]*\):.*## /\1	/p' $(MAKEFILE_LIST) | expand -t 10

smoke: $(PROJECT) ## the whole pipeline on a CPU, in minutes; the report is in out/
	.venv/bin/speedrun smoke --fresh --out out

test: $(PROJECT) ## all tests but the slow ones
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -m "not slow" --numprocesses 3 $(BY_FILE)

# Container and cluster wait for disks and for SkyPilot's next look, so they run beside chaos, one after the other.
# Each target's output comes whole, when it has ended.
SYNCED := $(if $(filter output-sync,$(.FEATURES)),--output-sync=target)
slow: $(PROJECT) $(SKY) ## all slow tests: the next three
	@$(MAKE) --jobs 2 --keep-going $(SYNCED) --no-print-directory chaos services

services: container
	@$(MAKE) --no-print-directory cluster

chaos: $(HF) ## kill -9 everywhere, many processes and nodes, a faulty S3 server, real CORE items, compiled steps
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -m "slow and not by_hand" --numprocesses 2 $(BY_FILE) \
	    --ignore tests/container --ignore tests/cluster

container: $(PROJECT) $(SKY) ## the image in a real engine, also in SkyPilot's hands (root, Debian; minutes)
	.venv/bin/python -m pytest -m slow tests/container

cluster: $(PROJECT) $(SKY) ## SkyPilot on a local Slurm, with a real S3 server (root, Debian; minutes)
	.venv/bin/python -m pytest -m slow tests/cluster

byhand: $(PROJECT) ## slow tests that change only with the arithmetic and take minutes; LOG.md keeps what came out
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -m by_hand --numprocesses 2

lint: $(PROJECT) ## style, formatting and types
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy

docs: $(PROJECT) ## docs/commands.md, from the command line itself
	.venv/bin/python docs/commands.py

bench: $(PROJECT) ## tables of timings (tests/bench/bench_*.py)
	.venv/bin/python -m pytest tests/bench --override-ini "python_files=bench_*.py" --capture=no

gpu: $(PROJECT) ## what ten minutes of one GPU can say, into out/gpu (tests/gpu/run.py); skipped without one
	.venv/bin/python tests/gpu/run.py --out $(or $(OUT),out/gpu)

image: ## the container image; TORCH=cpu for one without CUDA; COMPAT=DIR with cuda-compat-13-*.deb for older drivers
	$(BUILD) --target $(TARGET) --tag $(IMAGE) .

push: ## build it for SkyPilot and push it: make push IMAGE=ghcr.io/me/gpt2-speedrun:1
	@case '$(IMAGE)' in *YOUR-NAME*|*/you/*) false;; */*) ;; *) false;; esac \
	|| { echo "make: $(IMAGE) is no place to push to: say make push IMAGE=REGISTRY/NAME/gpt2-speedrun:TAG" >&2; \
	     exit 2; }
	$(BUILD) --platform linux/amd64 --target sky --tag $(IMAGE) .
	docker push $(IMAGE)

compose: ## the smoke in a container, its record in a real S3 server in another; the report is fetched to out/compose
	$(BUILD) --target runtime --tag $(IMAGE) .
	mkdir -p out/compose
	OWNER=$$(id -u) docker compose --file docker/compose.yaml run --rm --build fetch; \
	code=$$?; docker compose --file docker/compose.yaml down --volumes; exit $$code

hf: $(HF) ## into .venv what `speedrun evaluate --hf` needs besides (17 MB)

$(HF): $(PROJECT) requirements-hf.lock
	@$(PIP) install $(LOCKED) --no-deps -r requirements-hf.lock
	@touch $@

clean: ## remove .venv and caches; out/ stays
	rm -rf .venv .sky-env .lock-env build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(PROJECT): $(ENVIRONMENT) pyproject.toml
	@$(PIP) install --no-deps --no-build-isolation --editable .
	@touch $@

# Torch comes first and alone, so that its CPU build is asked for in one place at a time; it is not fetched again.
$(ENVIRONMENT):
	@case " $(LOCKED_PYTHONS) " in *" $$($(or $(PYTHON),false) -c '$(VERSION)' 2>/dev/null) "*) ;; *) \
	    echo "make: one of Python $(LOCKED_PYTHONS) is needed, with venv (those are what $(LOCK) has hashes for), and" \
	        "$(if $(PYTHON),$(PYTHON) is none,none is on the path): install one, or say make PYTHON=/path/to/it" >&2; \
	    exit 2;; esac
	@rm -f .venv/made-from-* # first of all: a half-removed environment must not be taken for a whole one
	rm -rf .venv
	$(PYTHON) -m venv .venv
	@lock=$(LOCK); \
	if [ $(TORCH) = cpu ] && [ "$$(uname)" != Darwin ]; then \
	    sed -n '/^torch==/,/[^\\]$$/p' $$lock >.venv/torch.txt; \
	    echo "Installing torch's CPU build (about 200 MB)"; \
	    $(PIP) install $(LOCKED) --no-deps --no-index -r .venv/torch.txt 2>/dev/null \
	    || $(PIP) install $(LOCKED) --no-deps --retries 1 --timeout 15 --index-url $(TORCH_CPU_INDEX) \
	        -r .venv/torch.txt \
	    || { echo "No CPU build of torch in pip's find-links or at $(TORCH_CPU_INDEX):" \
	              "taking the CUDA build, which runs on a CPU too (2.7 GB)"; \
	         lock=requirements-cuda.lock; }; \
	fi; \
	echo "Installing $$lock"; \
	$(PIP) install $(LOCKED) -r $$lock && cp $$lock .venv/installed.lock
	@touch $@

# --- SkyPilot, for the tests of sky/: an environment of its own, since it needs an older click than wandb

$(SKY):
	$(PYTHON) -m venv --clear .sky-env
	sed -n '/^uv==/,/[^\\]$$/p' tests/cluster/requirements.txt >.sky-env/uv.txt
	.sky-env/bin/python -m pip --disable-pip-version-check --quiet install $(LOCKED) -r .sky-env/uv.txt
	.sky-env/bin/uv pip install --quiet --python .sky-env/bin/python --require-hashes -r tests/cluster/requirements.txt
	@touch $@

# --- the locks: one for CPU machines, one for CUDA, from pyproject.toml; UPGRADE=--upgrade takes newer versions
#
# The CUDA lock is what PyPI's torch needs on Linux. The CPU lock is what the same versions need where torch has no CUDA
# (macOS); its torch is the CPU builds, whose hashes are listed here because the package index knows only one of them.
UV_VERSION := 0.13.9
PYTHONS := 3.11 3.12 3.13
COMPILE := MACOSX_DEPLOYMENT_TARGET=14.0 .lock-env/bin/uv --no-config pip compile --quiet --generate-hashes \
    --no-emit-index-url --no-emit-find-links --custom-compile-command "make lock"
WHEELS := $(COMPILE) --only-binary :all:
TORCH_VERSION := 2.13.0
TORCH_CPU_HASHES := \
    6746dbcbeb526eb61330b76b41ff1b4eb848951103a892eeb080dfa2b264667b \
    84453b69508ec79902f899c5ed9495acb9e2bbe9fda5f1d5d6f19e3c3842e1a7 \
    e76f9bcecc52b8ff711239a2f7547d5353df95878ab232f0773c1d95928b92f8 \
    4ca4a9394b0c771238a4f73590fdbbc4debad85ed0fa63d026ae1b085da7d6e2 \
    6f307c2c32d764ffc6ff6893b801fad6d4752f3e67966cb8abf1843427c02604 \
    2fe228aba290d14b9f31b049be550dbd469c3fd3013d7a19705b30454da97027 \
    3fbf9c9d1f3c10c2d59d04aca426dee9ccc6ceb32d255c61e93acc3b4f75fae6 \
    0b8f7d0423027ae8b90c7977c627f3379f325363a08224dffad9b4b2d684a83d \
    33449899ce5496c1b84b4853179d94fd102028ae1407314d9fb956bb79e70d09
# in this order, for Python 3.11, then 3.12, then 3.13: Linux x86_64 and Linux aarch64 (2.13.0+cpu), macOS arm64

# $(call lock,FILE,COMMAND): FILE as COMMAND makes it for the oldest Python, if the others get the same pins and hashes
define lock
	$(2) --python-version $(firstword $(PYTHONS)) $(UPGRADE) --output-file $(1)
	grep -v '^ *#' $(1) >.lock-env/pins
	for version in $(wordlist 2,9,$(PYTHONS)); do \
	    cp $(1) .lock-env/other.lock; \
	    $(2) --python-version $$version --output-file .lock-env/other.lock || exit 1; \
	    grep -v '^ *#' .lock-env/other.lock | diff .lock-env/pins - \
	        || { echo "make: $(1) does not serve Python $$version, which needs what differs above" >&2; exit 1; }; \
	done
endef

lock: ## make the locks from pyproject.toml and SkyPilot's; CUDA=cu126 makes the one for torch's builds of that kind
	$(or $(PYTHON),python3) -m venv --clear .lock-env
	.lock-env/bin/python -m pip install --quiet uv==$(UV_VERSION) packaging
	$(call lock,tests/cluster/requirements.txt,$(COMPILE) tests/cluster/requirements.in)
	$(call lock,requirements-cuda.lock,$(WHEELS) pyproject.toml --extra dev --extra attention \
	    --python-platform x86_64-manylinux_2_28)
	$(call lock,requirements.lock,$(WHEELS) pyproject.toml --extra dev --python-platform aarch64-apple-darwin \
	    --constraints requirements-cuda.lock --no-emit-package torch)
	printf '%s\n' '# but stands here, with the hashes of its CPU builds:' 'torch==$(TORCH_VERSION) \' >>requirements.lock
	printf '    --hash=sha256:%s \\\n' $(TORCH_CPU_HASHES) | sed '$$s/ .$$//' >>requirements.lock
	$(call lock,requirements-hf.lock,$(WHEELS) pyproject.toml --extra hf --python-platform aarch64-apple-darwin \
	    --constraints requirements.lock --no-emit-package torch \
	    $$(sed -n 's/^\([a-z0-9.-]*\)==.*/--no-emit-package \1/p' requirements.lock))
	$(call lock,tests/container/requirements.txt,$(WHEELS) tests/container/requirements.in \
	    --python-platform x86_64-manylinux_2_28)
	for lock in requirements.lock requirements-cuda.lock; do echo '# Python: $(PYTHONS)' >>$$lock; done
ifdef CUDA
	echo 'torch==$(TORCH_VERSION)+$(CUDA)' >.lock-env/torch.in
	$(WHEELS) pyproject.toml --extra dev --extra attention --python-version 3.11 \
	    --python-platform x86_64-manylinux_2_28 --index $(TORCH_INDEX)/$(CUDA) --index-strategy unsafe-best-match \
	    --constraints .lock-env/torch.in --constraints requirements.lock $(UPGRADE) --output-file requirements-$(CUDA).lock
endif

sizes: ## what the wheels of the CUDA image weigh, packed
	test -x .lock-env/bin/uv || { $(PYTHON) -m venv .lock-env \
	    && .lock-env/bin/python -m pip install --quiet uv==$(UV_VERSION) packaging; }
	$(PYTHON) docker/runtime_lock.py pyproject.toml requirements-cuda.lock >.lock-env/runtime.txt
	.lock-env/bin/uv --no-config pip compile --quiet .lock-env/runtime.txt --no-deps --python-version 3.11 \
	    --only-binary :all: --python-platform x86_64-manylinux_2_28 --format pylock.toml \
	    --output-file .lock-env/pylock.toml
	.lock-env/bin/python docker/wheel_sizes.py .lock-env/pylock.toml
