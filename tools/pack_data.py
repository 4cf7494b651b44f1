"""Group the samples of a token store into packs of one length; see `megatron_eagle/data/packing/index.py`."""

import argparse

from megatron_eagle.data.packing.index import write_packs
from megatron_eagle.errors import run_cli
from megatron_eagle.model.flops import patch_cost
from megatron_eagle.model.presets import preset


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True, help="folder of the token store")
    parser.add_argument("--length", required=True, type=int, help="tokens per pack, a length the store has")
    parser.add_argument("--seed", type=int, default=0, help="decides the composition (default %(default)s)")
    args = parser.parse_args()
    cost = patch_cost(preset("eagle2.5-8b").complete())
    report = write_packs(args.data, args.length, args.seed, cost)
    spread = f"{100 * report.cost_spread:.1f} %"
    print(
        f"{report.n_rows:,} samples in {report.n_packs:,} packs of {args.length:,} tokens, "
        f"{100 * report.fill:.2f} % full, cost of Eagle2.5-8B's attention and vision +- {spread}, "
        f"{report.seconds:.2f} s -> {args.data}/{args.length}/packs.arrow"
    )


if __name__ == "__main__":
    run_cli(main)
