"""`megatron-eagle serve` from a checkout: megatron_eagle/commands/serve.py."""

from megatron_eagle.commands.serve import main
from megatron_eagle.errors import run_cli

if __name__ == "__main__":
    run_cli(main)
