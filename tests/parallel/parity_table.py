"""`make parity`: print every layout's worst error against one process."""

import time

from tests.parallel.cases import LAYOUTS, ONE_PROCESS, combine, run, tiny_model
from tests.parallel.harness import launch
from tests.parallel.test_parity import TOLERANCE


def main() -> int:
    """Print the table; 1 if a cell is over the tolerance."""
    eagle = tiny_model()
    reference = combine(launch(run, 1, ONE_PROCESS, eagle))
    tensors = len(reference.gradients)
    print(f"fp32, loss and {tensors} gradients, max |g - ref| / max |ref| <= {TOLERANCE:g}\n")
    print("| layout | processes | loss | worst gradient | in | seconds |")
    print("|---|---|---|---|---|---|")
    failed = False
    for layout in LAYOUTS:
        start = time.perf_counter()
        errors = combine(launch(run, layout.world_size, layout, eagle)).errors(reference)
        seconds = time.perf_counter() - start
        loss = errors.pop("loss")
        worst, name = max((error, name) for name, error in errors.items())
        failed |= not max(loss, worst) <= TOLERANCE
        cells = (layout, layout.world_size, f"{loss:.1e}", f"{worst:.1e}", name, f"{seconds:.1f}")
        print(f"| {' | '.join(map(str, cells))} |", flush=True)
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
