"""`megatron-eagle annotate` from a checkout: megatron_eagle/commands/annotate.py."""

from megatron_eagle.commands.annotate import main
from megatron_eagle.errors import run_cli

if __name__ == "__main__":
    run_cli(main)
