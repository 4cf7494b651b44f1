"""Group the samples of a token store into packs of one length; see `megatron_eagle/data/packing/index.py`."""

import argparse
from collections.abc import Sequence

from megatron_eagle.data.packing.index import write_packs


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Run the command."""
    args = build_parser(prog).parse_args(argv)
    from megatron_eagle.model.flops import patch_cost  # these import torch
    from megatron_eagle.model.presets import preset

    cost = patch_cost(preset("eagle2.5-8b").complete())
    report = write_packs(args.data, args.length, args.seed, cost)
    spread = f"{100 * report.cost_spread:.1f} %"
    print(
        f"{report.n_rows:,} samples in {report.n_packs:,} packs of {args.length:,} tokens, "
        f"{100 * report.fill:.2f} % full, cost of Eagle2.5-8B's attention and vision +- {spread}, "
        f"{report.seconds:.2f} s -> {args.data}/{args.length}/packs.arrow"
    )


def build_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """What the command takes."""
    parser = argparse.ArgumentParser(prog, description=__doc__)
    parser.add_argument("--data", required=True, help="folder of the token store")
    parser.add_argument("--length", required=True, type=int, help="tokens per pack, a length the store has")
    parser.add_argument("--seed", type=int, default=0, help="decides the composition (default %(default)s)")
    return parser
