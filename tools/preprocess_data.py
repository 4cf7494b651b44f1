"""`megatron-eagle preprocess` from a checkout: megatron_eagle/commands/preprocess.py."""

from megatron_eagle.commands.preprocess import main
from megatron_eagle.errors import run_cli

if __name__ == "__main__":
    run_cli(main)
