# GPU image. State: written, NOT YET BUILT or run; versions below are choices, not results.
#
#   docker build -t megatron-eagle .
#   docker run --gpus all --ipc=host -it megatron-eagle
#
# The base brings Python 3.12, a CUDA 12 torch, Transformer Engine and flash-attn. A CUDA 12 base, because
# the `dali` extra names DALI's CUDA 12 wheel.
ARG BASE=nvcr.io/nvidia/pytorch:25.06-py3
FROM ${BASE}

# Apex: Megatron-Core's fused gradient accumulation and multi-tensor kernels. APEX_REF: a branch, tag or
# commit; name a commit for an image that can be built again.
ARG APEX_REF=master
ARG MAX_JOBS=8
ENV MAX_JOBS=${MAX_JOBS}
RUN git clone https://github.com/NVIDIA/apex /opt/apex \
    && git -C /opt/apex checkout ${APEX_REF} \
    && APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install -v --no-cache-dir --no-build-isolation /opt/apex \
    && rm -rf /opt/apex

# --no-build-isolation: extensions are built against the image's own torch. The image's pip constraints stay
# in force, so that torch and Transformer Engine are not replaced.
WORKDIR /workspace/megatron-eagle
COPY . .
RUN pip install --no-cache-dir --no-build-isolation -e '.[gpu,dali]'

ENV CUDA_DEVICE_MAX_CONNECTIONS=1
CMD ["bash"]
