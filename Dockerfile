# GPU image. State: written, NOT YET BUILT or run; versions below are choices, not results. hadolint 2.15.1 is silent.
#
#   docker build -t megatron-eagle .
#   docker run --gpus all --ipc=host -it megatron-eagle
#
# From the base, pinned by its tag and by the list of its packages in /etc/pip/constraint.txt, which stays in force:
# Python, torch, CUDA 13, NCCL, cuDNN, Transformer Engine, flash-attn, Apex, nvidia-resiliency-ext. Which versions,
# and how that is known: tools/image/base.toml.
ARG BASE=nvcr.io/nvidia/pytorch:26.07-py3
FROM ${BASE}

# A base that is too old, or lacks one of them, ends the build here, in a second and in one line.
COPY tools/image /opt/image
RUN python /opt/image/check_base.py

# Apex is the base's own: nothing of it has to be built for its norm, multi-tensor kernels and fused Adam. The base
# also pins its own DALI and what comes with it, all older than what is tested here.
WORKDIR /workspace/megatron-eagle
COPY . .
RUN sed -i -E '/^nvidia[-_](dali|nvimgcodec|libnvcomp|nvjpeg|nvjpeg2k|nvtiff)/d' /etc/pip/constraint.txt \
    && pip install --no-cache-dir --no-build-isolation -e '.[dali-cuda13,demo,serve,cluster,monitor]' wandb==0.31.0

# What came of it stands in the build's log.
RUN python -c "from importlib.metadata import version; \
    print({name: version(name) for name in ('torch', 'transformer_engine', 'flash_attn', 'apex', \
    'nvidia-dali-cuda130', 'megatron-core')})"

ENV CUDA_DEVICE_MAX_CONNECTIONS=1
CMD ["bash"]
