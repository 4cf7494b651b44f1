"""Megatron-Eagle: long-context vision-language training (Eagle 2.5) on Megatron-Core."""

import warnings

__version__ = "0.1.0"

# Megatron tells every process at import which optional libraries it did not find, seven times over.
warnings.filterwarnings("ignore", message=".*(Transformer Engine|Apex).*not installed.*")
warnings.filterwarnings("ignore", message="full scope is deprecated.*")
# Megatron calls collectives by names that torch 2.13 renamed.
warnings.filterwarnings("ignore", message=".*torch.distributed.*is deprecated.*")
