"""`megatron-eagle preview` from a checkout: megatron_eagle/commands/preview.py."""

from megatron_eagle.commands.preview import main
from megatron_eagle.errors import run_cli

if __name__ == "__main__":
    run_cli(main)
