"""Operators of Megatron-Eagle, each in one file with its eager form."""
