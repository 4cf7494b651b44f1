"""`megatron-eagle evaluate` from a checkout: megatron_eagle/commands/evaluate.py."""

from megatron_eagle.commands.evaluate import main
from megatron_eagle.errors import run_cli

if __name__ == "__main__":
    run_cli(main)
