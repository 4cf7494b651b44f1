"""Eagle 2.5 on Megatron-Core: its sizes, its parts, and what of them trains."""
