# syntax=docker/dockerfile:1
# The environments of launch/setup.sh as images; nothing in the package needs an image.
#   docker build --tag megatron-rl .                                                      for GPUs
#   docker build --tag megatron-rl --build-arg APEX_REF=<tag or commit of NVIDIA/apex> .  with apex's fused kernels
#   docker build --tag megatron-rl-cpu --target cpu .                                     for development, without a GPU
#
# NVIDIA's PyTorch image is the base for what it brings around PyTorch: the CUDA compiler, which SGLang's kernels are compiled
# with at run time, and the network stack of InfiniBand machines (UCX, rdma-core, NCCL's plugins). Its own PyTorch and
# Transformer Engine stay unused: the environment is one of its own, with the stock packages of the lock, of the same CUDA.
# Where the image is too large: --build-arg GPU_BASE=nvidia/cuda:13.0.2-devel-ubuntu24.04
ARG GPU_BASE=nvcr.io/nvidia/pytorch:25.11-py3

FROM python:3.12.12-slim-bookworm AS cpu
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
# The last four are for the tests: the report's page in a browser, the scripts, and SLURM.
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends \
        g++ git libnuma1 chromium shellcheck slurm-wlm munge \
    && rm -rf /var/lib/apt/lists/*
RUN useradd --create-home --uid 1001 trainer
USER trainer
WORKDIR /home/trainer/megatron-rl
# What the environment is made from; a change in the code alone does not make it anew.
COPY --chown=trainer launch launch
COPY --chown=trainer pyproject.toml README.md LICENSE ./
COPY --chown=trainer megatron_rl/__init__.py megatron_rl/
# A mounted cache lies on another file system, where files cannot be linked.
RUN --mount=type=cache,target=/home/trainer/.cache/uv,uid=1001 UV_LINK_MODE=copy launch/setup.sh --cpu
ENV PATH=/home/trainer/megatron-rl/.venv/bin:$PATH
COPY --chown=trainer . .
HEALTHCHECK --interval=5m --timeout=1m CMD ["megatron-rl", "version"]
CMD ["megatron-rl", "--help"]

FROM $GPU_BASE AS gpu
# The base's CUDA. A test compares it with the lock's.
LABEL cuda="13.0.2"
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
# NVIDIA's packages stay as they are, where they are there already.
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends --no-upgrade \
        git ibverbs-providers libibverbs1 libnuma1 python3-dev python3-pip \
    && rm -rf /var/lib/apt/lists/*
RUN useradd --create-home --uid 1001 trainer
USER trainer
WORKDIR /home/trainer/megatron-rl
COPY --chown=trainer launch launch
COPY --chown=trainer pyproject.toml README.md LICENSE ./
COPY --chown=trainer megatron_rl/__init__.py megatron_rl/
# The base has pip hold versions that are not the lock's.
ENV PIP_CONSTRAINT=
RUN --mount=type=cache,target=/home/trainer/.cache/uv,uid=1001 UV_LINK_MODE=copy launch/setup.sh --gpu
ENV PATH=/home/trainer/megatron-rl/.venv/bin:$PATH

# Fused kernels that Megatron-core uses where it finds them, and does without where it does not. The package named apex on the
# package index is an unrelated project.
ARG APEX_REF=""
RUN if [[ -n "$APEX_REF" ]]; then \
        . launch/common.sh; \
        git clone https://github.com/NVIDIA/apex /tmp/apex; \
        git -C /tmp/apex checkout "$APEX_REF"; \
        export APEX_CPP_EXT=1 APEX_CUDA_EXT=1; \
        "$(bring_uv)" pip install --python .venv/bin/python --no-deps --no-build-isolation /tmp/apex; \
        rm -rf /tmp/apex; \
    fi

COPY --chown=trainer . .
# The base's would print a banner, and stand between a signal and the program.
ENTRYPOINT []
# A GPU that has fallen off the bus. What a run or a server is doing, its own console and /health tell.
HEALTHCHECK --interval=1m --timeout=30s CMD ["nvidia-smi", "--list-gpus"]
CMD ["megatron-rl", "--help"]
