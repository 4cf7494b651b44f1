"""Hugging Face folders in and out of Megatron checkpoints."""
