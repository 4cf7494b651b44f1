"""Megatron-Eagle: long-context vision-language training (Eagle 2.5) on Megatron-Core."""

__version__ = "0.1.0"
