"""`megatron-eagle compare` from a checkout: megatron_eagle/commands/compare.py."""

from megatron_eagle.commands.compare import main
from megatron_eagle.errors import run_cli

if __name__ == "__main__":
    run_cli(main)
