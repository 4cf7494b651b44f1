"""What a training step reaches on each GPU type: one table for planner, timeline and rehearsal.

Peaks, memory and links are the datasheets' (`runtime/gpus.py`); here is what of them kernels attain, each
number with its source or "assumed". A GPU that is not in the table attains the shares of the one of its
architecture that is.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_eagle.context_parallel.backends import AttentionName
from megatron_eagle.errors import UserError
from megatron_eagle.runtime.gpus import GPUS, Gpu


@dataclass(frozen=True)
class Figure:
    """A number and where it is from."""

    value: float
    source: str


@dataclass(frozen=True)
class AttentionRate:
    """FLOP/s of an attention kernel, those of its backward with the scores that it computes again."""

    forward: Figure
    backward: Figure


@dataclass(frozen=True)
class GpuRates:
    """What one GPU type attains."""

    multiprocessors: Figure
    matmul: Figure  # FLOP/s, bf16 with fp32 sums, of the best shapes
    attention: Mapping[str, AttentionRate]  # by kernel, heads of 128 features
    # What a whole step has of the best shapes' rate: its own shapes, clocks under the power limit.
    sustained: Figure = Figure(0.8, "assumed; `bench.py train_gpu` on a GPU would say")
    memory: Figure = Figure(0.85, "assumed: of the datasheet's, elementwise kernels")
    link: Figure = Figure(0.8, "assumed: of the datasheet's, NCCL's large rings")
    network: Figure = Figure(
        45e9, "assumed: 90 % of a 400 Gb/s adapter per GPU, one direction (HGX reference design)"
    )


_BOOK = "S. Bekman, Machine Learning Engineering, table of maximum achievable matmul FLOPS in bf16"
_FA3 = "FlashAttention-3 paper (arXiv 2407.08608), bars of figures 5 and 6: H100 SXM5, 16k tokens, no mask"
_FA2 = "FlashAttention-2 paper (arXiv 2307.08691): up to 73 % of an A100's peak forward, 63 % backward"
_FA4 = "FlashAttention-4 report (arXiv 2603.05451): 1613 TFLOP/s on a B200 are 1.3 times cuDNN 9.13"


def _both(forward: float, backward: float, source: str) -> AttentionRate:
    return AttentionRate(Figure(forward, source), Figure(backward, source))


def _scaled(rates: Mapping[str, AttentionRate], factor: float, why: str) -> dict[str, AttentionRate]:
    return {
        name: _both(factor * rate.forward.value, factor * rate.backward.value, f"assumed: {why}")
        for name, rate in rates.items()
    }


_HOPPER = {
    "flash3": _both(648e12, 561e12, _FA3),
    "cudnn": _both(595e12, 516e12, _FA3),
    "flash": _both(370e12, 322e12, _FA3),
}
_AMPERE = {
    "flash": _both(0.73 * 312e12, 0.63 * 312e12, _FA2),
    "cudnn": _both(0.73 * 312e12, 0.63 * 312e12, "assumed: as FlashAttention 2"),
}
_PCIE = 756 / 989  # of the H100's peak
RATES = {
    "a100": GpuRates(
        Figure(108, "NVIDIA A100 whitepaper"),
        Figure(271.2e12, _BOOK),
        _AMPERE,
        sustained=Figure(0.95, "assumed: that paper trains at 225 TFLOP/s, all kernels together"),
    ),
    "l40s": GpuRates(
        Figure(142, "NVIDIA L40S datasheet: 18,176 cores, 128 each"),
        Figure(0.8 * 362.05e12, "assumed: 80 % of the peak"),
        dict.fromkeys(
            ("flash", "cudnn"),
            _both(0.6 * 362.05e12, 0.5 * 362.05e12, "assumed: 60 and 50 % of the peak"),
        ),
        link=Figure(0.8, "assumed: of PCIe"),
    ),
    "h100": GpuRates(Figure(132, "NVIDIA H100 whitepaper"), Figure(794.5e12, _BOOK), _HOPPER),
    "h100-pcie": GpuRates(
        Figure(114, "NVIDIA H100 whitepaper"),
        Figure(794.5e12 * _PCIE, "assumed: the SXM module's share of the peak"),
        _scaled(_HOPPER, _PCIE, "the SXM module's share of the peak"),
        link=Figure(0.8, "assumed: of PCIe"),
    ),
    "h200": GpuRates(
        Figure(132, "assumed: the die of the H100"),
        Figure(790e12, "measured on one H200; the same table of Bekman's says as the H100"),
        _scaled(_HOPPER, 1.0, "as the H100, whose die and clocks it has"),
    ),
    "b200": GpuRates(
        Figure(148, "assumed: no datasheet of NVIDIA's counts them"),
        Figure(1745e12, _BOOK),
        {
            "flash4": AttentionRate(
                Figure(1613e12, _FA4), Figure(1613e12 * 516 / 595, "assumed: the ratio of cuDNN on an H100")
            ),
            "cudnn": AttentionRate(
                Figure(1613e12 / 1.3, _FA4),
                Figure(1613e12 / 1.3 * 516 / 595, "assumed: its ratio on an H100"),
            ),
            "flash": _both(
                370e12 * 148 / 132,
                322e12 * 148 / 132,
                "assumed: as fast as the H100 on each multiprocessor, whose instructions it uses",
            ),
        },
    ),
}
_OF_ARCHITECTURE = {"ampere": "a100", "ada": "l40s", "hopper": "h100", "blackwell": "b200"}
# Whose kernel a backend runs. Auto: FlashAttention 2, which torch brings.
_KERNEL: dict[AttentionName, str] = {
    "auto": "flash",
    "flash4": "flash4",
    "flash3": "flash3",
    "flash": "flash",
    "torch_varlen": "flash",
    "cudnn": "cudnn",
    "te": "cudnn",
}


@dataclass(frozen=True)
class Machine:
    """Nodes of one GPU type as a step finds them, SI units per GPU."""

    peak: float  # dense bf16 FLOP/s of the datasheet; MFU is quoted against it
    gemm: float  # FLOP/s of bf16 matrix products
    attention: float  # FLOP/s, forward
    attention_backward: float  # FLOP/s of all that it executes
    memory: float  # byte/s
    link: float  # byte/s in one direction inside of a node
    network: float  # byte/s in one direction between nodes
    multiprocessors: int
    kernel: str  # of attention
    gpus_per_node: int = 8

    @classmethod
    def of(cls, gpu: Gpu, gpus_per_node: int = 8, attention: AttentionName = "auto") -> "Machine":
        """Nodes of so many `gpu`, with the kernel that `layers.attention` names.

        Raises:
            UserError: no rate is known for that kernel there.
        """
        rates, of = reference(gpu), gpu.peak / GPUS[reference_name(gpu)].peak
        kernel = _KERNEL.get(attention)
        if kernel is None or kernel not in rates.attention:
            raise UserError(
                f"layers.attention {attention}: no speed is known for it on {gpu.name} (planning/rates.py); "
                f"choose auto or {' or '.join(sorted(rates.attention))}"
            )
        rate = rates.attention[kernel]
        return cls(
            peak=gpu.peak,
            gemm=rates.sustained.value * of * rates.matmul.value,
            attention=of * rate.forward.value,
            attention_backward=of * rate.backward.value,
            memory=rates.memory.value * gpu.bandwidth,
            link=rates.link.value * gpu.link,
            network=rates.network.value,
            multiprocessors=int(rates.multiprocessors.value),
            kernel=kernel,
            gpus_per_node=gpus_per_node,
        )

    def ring(self, members: Sequence[int]) -> float:
        """Byte/s that a ring over these ranks passes through each of them."""
        return self.bandwidth(len(members), members[1] - members[0])

    def bandwidth(self, size: int, stride: int) -> float:
        """Byte/s that a ring over `size` ranks, `stride` apart, passes through each of them.

        Members on one node share its network adapters, one each.
        """
        together = self._on_a_node(stride)
        return self.link if size <= together else min(self.link, self.network * together)

    def exchange_seconds(self, nbytes: float, size: int, stride: int) -> float:
        """Seconds of an all-to-all among `size` ranks, `stride` apart, each with `nbytes`, as many for each.

        What is for other nodes passes a rank's own adapter: members on one node share theirs in rings alone.
        """
        near = min(size, self._on_a_node(stride))
        inside, outside = (near - 1) / size, (size - near) / size
        return nbytes * max(inside / self.link, outside / self.network)

    def _on_a_node(self, stride: int) -> int:
        return max(1, self.gpus_per_node // stride)


def reference_name(gpu: Gpu) -> str:
    """The row of `RATES` that holds for a GPU, by its short name."""
    return gpu.short if gpu.short in RATES else _OF_ARCHITECTURE[gpu.architecture]


def reference(gpu: Gpu) -> GpuRates:
    """What a GPU attains, or the one of its architecture that is in the table."""
    return RATES[reference_name(gpu)]


def describe_rates(machine: Machine, gpu: Gpu, attention: AttentionName) -> str:
    """The rates of a plan in one line, with the attention kernels that would be faster."""
    others = {
        name: Machine.of(gpu, machine.gpus_per_node, name)  # type: ignore[arg-type]  # keys are names
        for name in reference(gpu).attention
        if name != machine.kernel
    }
    faster = [
        f"{name} {other.attention / 1e12:.0f} and {other.attention_backward / 1e12:.0f}"
        for name, other in others.items()
        if other.attention > machine.attention
    ]
    return (
        f"rates: matrix products {machine.gemm / 1e12:.0f} of {machine.peak / 1e12:.0f} TFLOP/s, attention "
        f"({attention}) {machine.attention / 1e12:.0f} forward and {machine.attention_backward / 1e12:.0f} "
        f"backward, memory {machine.memory / 1e12:.2f} TB/s, links {machine.link / 1e9:.0f} and "
        f"{machine.network / 1e9:.0f} GB/s"
        + (f"; attention by {', by '.join(faster)} TFLOP/s" if faster else "")
    )


def rates_table() -> str:
    """All rates as a Markdown table, for the documentation."""
    lines = ["| GPU | what | rate | source |", "|---|---|---:|---|"]
    for name, rates in RATES.items():
        gpu = GPUS[name]
        rows = [
            ("matrix products, best shapes", f"{rates.matmul.value / 1e12:.0f} TFLOP/s", rates.matmul.source),
            ("of that, a whole step", f"{rates.sustained.value:.0%}", rates.sustained.source),
            ("memory", f"{rates.memory.value * gpu.bandwidth / 1e12:.2f} TB/s", rates.memory.source),
            ("link in a node", f"{rates.link.value * gpu.link / 1e9:.0f} GB/s", rates.link.source),
            ("network", f"{rates.network.value / 1e9:.0f} GB/s", rates.network.source),
            ("multiprocessors", f"{rates.multiprocessors.value:.0f}", rates.multiprocessors.source),
        ]
        for kernel, rate in rates.attention.items():
            for way, figure in (("forward", rate.forward), ("backward", rate.backward)):
                what = f"attention {kernel}, {way}"
                rows.append((what, f"{figure.value / 1e12:.0f} TFLOP/s", figure.source))
        lines += [f"| {name} | {' | '.join(row)} |" for row in rows]
    return "\n".join(lines)
