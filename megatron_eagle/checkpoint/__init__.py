"""Checkpoints that any layout can read: Megatron's distributed format, written completely or not at all.

    C/latest_checkpointed_iteration.txt   the iteration to load, written last
    C/iter_0000120/                       common.pt, .metadata, __*.distcp, metadata.json (Megatron)
                                          run.yaml    the run's configuration, resolved
                                          state.json  {"iteration": ..., "consumed_packs": ...}
                                          manifest.json  size and SHA-256 of every other file
    C/hf/                                 what an export to Hugging Face needs and training does not touch

Keys in a checkpoint do not know ranks: layers carry their global index, tensors their global shape,
optimizer state is stored per parameter. There is no random state: training draws no random numbers (no
dropout; the data order is a function of the seed and of `consumed_packs`).
"""

from megatron_eagle.checkpoint.content import CONTENT_METADATA, bytes_to_save, checkpoint_bytes
from megatron_eagle.checkpoint.folder import (
    TRACKER,
    BatchRead,
    TrainState,
    check_space,
    checkpoint_folder,
    has_checkpoint,
    read_lora_config,
    read_model_config,
    read_train_state,
    read_trainable,
    saved_iterations,
)
from megatron_eagle.checkpoint.hf_folder import HF_FOLDER, save_hf_folder
from megatron_eagle.checkpoint.index import read_index
from megatron_eagle.checkpoint.loading import load_checkpoint
from megatron_eagle.checkpoint.saver import CheckpointConfig, CheckpointSaver
from megatron_eagle.checkpoint.saving import save_checkpoint

__all__ = [
    "CONTENT_METADATA",
    "HF_FOLDER",
    "TRACKER",
    "BatchRead",
    "CheckpointConfig",
    "CheckpointSaver",
    "TrainState",
    "bytes_to_save",
    "check_space",
    "checkpoint_bytes",
    "checkpoint_folder",
    "has_checkpoint",
    "load_checkpoint",
    "read_index",
    "read_lora_config",
    "read_model_config",
    "read_train_state",
    "read_trainable",
    "save_checkpoint",
    "save_hf_folder",
    "saved_iterations",
]
