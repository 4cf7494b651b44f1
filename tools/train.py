"""`megatron-eagle train` from a checkout: megatron_eagle/commands/train.py."""

from megatron_eagle.commands.train import main
from megatron_eagle.errors import run_cli

if __name__ == "__main__":
    run_cli(main)
