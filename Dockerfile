# GPU image. State: written, NOT YET BUILT or run; versions below are choices, not results. hadolint 2.15.1 is silent.
#
#   docker build -t megatron-eagle .
#   docker run --gpus all --ipc=host -it megatron-eagle
#
# From the base, pinned by its tag and by the list of its packages in /etc/pip/constraint.txt, which stays in force:
# Python 3.12, torch, CUDA 12.9, NCCL, cuDNN, Transformer Engine, flash-attn. A CUDA 12 base, because the `dali`
# extra and nvidia-resiliency-ext bring CUDA 12 wheels.
ARG BASE=nvcr.io/nvidia/pytorch:25.06-py3
FROM ${BASE}

# Apex: Megatron-Core's fused gradient accumulation, multi-tensor kernels and fused Adam.
ARG APEX_COMMIT=10417aceddd7d5d05d7cbf7b0fc2daad1105f8b4
ARG MAX_JOBS=8
ENV MAX_JOBS=${MAX_JOBS}
RUN git clone https://github.com/NVIDIA/apex /opt/apex \
    && git -C /opt/apex checkout ${APEX_COMMIT} \
    && APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install -v --no-cache-dir --no-build-isolation /opt/apex \
    && rm -rf /opt/apex

# The base's own DALI is older than the one that is tested here. Extensions, if any is built, are built against
# the image's torch.
WORKDIR /workspace/megatron-eagle
COPY . .
RUN sed -i '/^nvidia[-_]dali/d' /etc/pip/constraint.txt \
    && pip install --no-cache-dir --no-build-isolation -e '.[dali,demo,serve,cluster]' \
        wandb==0.31.0 nvidia-resiliency-ext==0.4.1

# A base without one of these is the wrong base; their versions stand in the build's log.
RUN python -c "from importlib.metadata import version; \
    print({name: version(name) for name in ('torch', 'transformer_engine', 'flash_attn', 'apex', \
    'nvidia-dali-cuda120', 'megatron-core')})"

ENV CUDA_DEVICE_MAX_CONNECTIONS=1
CMD ["bash"]
