"""`megatron-eagle` and `python -m megatron_eagle`."""

from megatron_eagle.commands.table import main
from megatron_eagle.errors import run_cli


def start() -> None:
    """Run the command that the command line names, and exit."""
    run_cli(main)


if __name__ == "__main__":
    start()
