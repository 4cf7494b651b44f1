"""Look into a token store.  See `megatron_eagle/data/preview.py`."""

import argparse
import json

from megatron_eagle.data.preview import describe
from megatron_eagle.data.store import SampleStore
from megatron_eagle.errors import run_cli


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    show = parser.add_subparsers(required=True, metavar="COMMAND").add_parser("show", help="one sample")
    show.add_argument("data", metavar="D", help="folder of the token store")
    show.add_argument("--sample", required=True, type=int, metavar="I", help="row of the store, from 0")
    show.add_argument("--length", type=int, help="token limit of the plan (default: the longest)")
    show.add_argument("--json", required=True, action="store_true", help="print it as one JSON object")
    args = parser.parse_args()
    print(json.dumps(describe(SampleStore(args.data, args.length), args.sample)))


if __name__ == "__main__":
    run_cli(main)
