"""`megatron-eagle pack` from a checkout: megatron_eagle/commands/pack.py."""

from megatron_eagle.commands.pack import main
from megatron_eagle.errors import run_cli

if __name__ == "__main__":
    run_cli(main)
