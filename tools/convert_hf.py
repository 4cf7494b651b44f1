"""Convert between Hugging Face folders and Megatron checkpoints.

convert_hf.py import --hf H --checkpoint C     H: an Eagle 2.5 folder; C: a new folder
convert_hf.py export --checkpoint C --hf H     C: a checkpoint of any layout; H: a new or earlier export

Of a checkpoint with LoRA adapters:

convert_hf.py export --checkpoint C --hf H               H: the model with its adapters merged
convert_hf.py export --checkpoint C --adapter A          A: the adapters alone, as peft stores them, for the
                                                         model that the run started from
convert_hf.py export --checkpoint C --hf H --adapter A   H: the model without adapters, A: those that fit it
"""

import argparse
import os
import warnings
from pathlib import Path

from megatron_eagle.errors import UserError, run_cli


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (
        ("import", "make a checkpoint from a Hugging Face folder"),
        ("export", "make a Hugging Face folder from a checkpoint"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("--hf", type=Path, required=name == "import", help="Hugging Face folder")
        command.add_argument("--checkpoint", type=Path, required=True, help="Megatron checkpoint folder")
    command.add_argument(
        "--max-tiles", type=int, help="tiles per picture for the exported processor (default: the source's)"
    )
    command.add_argument("--adapter", type=Path, help="folder for LoRA adapters, which --hf then leaves out")
    options = parser.parse_args()
    if options.command == "export" and options.hf is None and options.adapter is None:
        raise UserError("export: name --hf, --adapter or both")
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # nothing here is worth compiling

    from megatron_eagle.convert.from_hf import import_hf
    from megatron_eagle.convert.lora import export_adapter
    from megatron_eagle.convert.to_hf import export_hf

    # Between the pinned Megatron and torch; their imports reset earlier filters.
    warnings.filterwarnings("ignore", category=FutureWarning)
    if options.command == "import":
        config = import_hf(options.hf, options.checkpoint)
        print(
            f"{options.checkpoint}: {config.text.num_hidden_layers} language layers, "
            f"{config.vision.num_hidden_layers} vision layers, {config.text.vocab_size} tokens"
        )
        return
    merge = options.adapter is None
    if not merge:
        files = export_adapter(options.checkpoint, options.adapter, base=options.hf)
        print(f"{options.adapter}: {', '.join(files)}")
    if options.hf is not None:
        files = export_hf(options.checkpoint, options.hf, max_tiles=options.max_tiles, merge=merge)
        print(f"{options.hf}: {', '.join(files)}")


if __name__ == "__main__":
    run_cli(main)
