# syntax=docker/dockerfile:1
# The GPU environment as an image:
#   docker build --tag megatron-rl .
#   docker build --tag megatron-rl --build-arg APEX_REF=<tag or commit of NVIDIA/apex> .
# The devel base brings nvcc, which SGLang's kernels are compiled with at run time. Nothing in the package needs this image:
# launch/setup.sh --gpu makes the same environment on any machine.
FROM nvidia/cuda:13.0.2-devel-ubuntu24.04

RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends \
        git ibverbs-providers libibverbs1 libnuma1 python3-dev python3-pip \
    && rm -rf /var/lib/apt/lists/*

RUN useradd --create-home --uid 1001 trainer
USER trainer
WORKDIR /home/trainer/megatron-rl
COPY --chown=trainer . .
# A mounted cache lies on another file system, where files cannot be linked.
RUN --mount=type=cache,target=/home/trainer/.cache/uv,uid=1001 UV_LINK_MODE=copy launch/setup.sh --gpu
ENV PATH=/home/trainer/megatron-rl/.venv/bin:$PATH

# Fused kernels that Megatron-core uses where it finds them, and does without where it does not. The package named apex on the
# package index is an unrelated project.
ARG APEX_REF=""
RUN if [ -n "$APEX_REF" ]; then \
        git clone https://github.com/NVIDIA/apex /tmp/apex \
        && git -C /tmp/apex checkout "$APEX_REF" \
        && APEX_CPP_EXT=1 APEX_CUDA_EXT=1 .tools/uv/bin/uv pip install --no-deps --no-build-isolation /tmp/apex \
        && rm -rf /tmp/apex; \
    fi

CMD ["megatron-rl", "--help"]
