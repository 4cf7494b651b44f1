"""`megatron-eagle generate` from a checkout: megatron_eagle/commands/generate.py."""

from megatron_eagle.commands.generate import main
from megatron_eagle.errors import run_cli

if __name__ == "__main__":
    run_cli(main)
