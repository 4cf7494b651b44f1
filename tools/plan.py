"""`megatron-eagle plan` from a checkout: megatron_eagle/commands/plan.py."""

from megatron_eagle.commands.plan import main
from megatron_eagle.errors import run_cli

if __name__ == "__main__":
    run_cli(main)
