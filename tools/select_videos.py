"""`megatron-eagle select` from a checkout: megatron_eagle/commands/select.py."""

from megatron_eagle.commands.select import main
from megatron_eagle.errors import run_cli

if __name__ == "__main__":
    run_cli(main)
