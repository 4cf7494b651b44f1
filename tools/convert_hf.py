"""`megatron-eagle convert` from a checkout: megatron_eagle/commands/convert.py."""

from megatron_eagle.commands.convert import main
from megatron_eagle.errors import run_cli

if __name__ == "__main__":
    run_cli(main)
