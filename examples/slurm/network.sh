#!/usr/bin/env bash
# Presets for a cluster's network, for NETWORK=examples/slurm/network.sh or a copy of it.
#
# Every script of this folder reads the file on each node, in the container too, before it starts anything. NCCL and
# gloo mostly find the network themselves, so that all of it stands behind comments: take away those of your kind, and
# look with NCCL_DEBUG=INFO at what was used (`NET/IB`, `NET/OFI`, or `NET/Socket`, which is the slow one). Lines may
# ask for the node: `hostname` and so on.

# Which interfaces carry sockets: torchrun's meeting, gloo, and NCCL's start. `ip -br address` shows their names.
# Without it a node that has docker0 or a management network may offer an address that the others do not reach.
# export NCCL_SOCKET_IFNAME=eth0 GLOO_SOCKET_IFNAME=eth0     # `^docker0,lo` in the former: all but these

# InfiniBand and RoCE: the adapters next to the GPUs (`ibv_devinfo -l`, `nvidia-smi topo -m`), not those of the storage.
# export NCCL_IB_HCA=mlx5_0,mlx5_1,mlx5_4,mlx5_5             # `=mlx5_1` means exactly that name
# export NCCL_IB_GID_INDEX=3                                 # RoCE version 2 (`show_gids`)
# export NCCL_IB_TC=106                                      # RoCE: the traffic class of the lossless queue
# export NCCL_IB_TIMEOUT=22 NCCL_IB_RETRY_CNT=7              # a fabric that is large, or repairs itself
# export NCCL_IB_DISABLE=1                                   # none: sockets

# AWS EFA, by libfabric and the aws-ofi-nccl plugin, which the image must hold.
# export FI_PROVIDER=efa FI_EFA_USE_DEVICE_RDMA=1
# export LD_LIBRARY_PATH=/opt/amazon/ofi-nccl/lib:/opt/amazon/efa/lib:${LD_LIBRARY_PATH:-}
# export NCCL_SOCKET_IFNAME=^docker,lo,veth

# When nothing helps: what NCCL has found, and which of its ways was taken.
# export NCCL_DEBUG=INFO NCCL_DEBUG_SUBSYS=INIT,NET
