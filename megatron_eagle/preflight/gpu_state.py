"""The GPUs of this node and what ails them, as `nvidia-smi` has it. Not yet run on a GPU: see the tests."""

import subprocess
from dataclasses import dataclass

from megatron_eagle.problems import Problem

_FIELDS = (
    "index",
    "uuid",
    "name",
    "driver_version",
    "persistence_mode",
    "ecc.mode.current",
    "ecc.errors.uncorrected.volatile.total",
)
# By its name from driver 535 on, and before.
_REASONS = ("clocks_event_reasons.active", "clocks_throttle_reasons.active")
# Bits of NVML (nvmlClocksEventReasons, nvmlClocksThrottleReasons) that no healthy GPU shows at rest. The
# others are rest itself, limits that were set, and the power cap.
_SLOWDOWNS = {
    0x08: "hardware slowdown",
    0x20: "thermal slowdown by software",
    0x40: "thermal slowdown by hardware",
    0x80: "power brake",
}
_SECONDS = 60


@dataclass(frozen=True)
class GpuState:
    """A GPU.

    Attributes:
        persistence: None: it does not say, as the two below.
        ecc: whether memory errors are found.
        ecc_errors: that could not be corrected, since the driver was loaded.
        slowdowns: why its clocks are held down.
    """

    index: int
    uuid: str
    name: str
    driver: str
    persistence: bool | None
    ecc: bool | None
    ecc_errors: int | None
    slowdowns: tuple[str, ...] = ()


def read_gpus(command: str = "nvidia-smi") -> list[GpuState]:
    """The GPUs that this process may see; none where there is no `nvidia-smi`.

    Raises:
        Problem: it does not answer, which a driver that has lost a GPU makes it do.
    """
    for reasons in _REASONS:
        query = [command, f"--query-gpu={','.join([*_FIELDS, reasons])}", "--format=csv,noheader,nounits"]
        try:
            asked = subprocess.run(query, capture_output=True, text=True, timeout=_SECONDS, check=False)
        except FileNotFoundError:
            return []
        except subprocess.TimeoutExpired:
            raise Problem("nvidia-smi does not answer", f"within {_SECONDS} s") from None
        if asked.returncode == 0:
            return parse_gpus(asked.stdout)
        said = (asked.stdout + asked.stderr).strip()
        if "is not a valid field" not in said:
            break
    raise Problem(f"nvidia-smi ended with status {asked.returncode}", said.partition("\n")[0])


def parse_gpus(answer: str) -> list[GpuState]:
    """The lines of `--format=csv,noheader,nounits`.

    Raises:
        Problem: they are none.
    """
    found = []
    for line in filter(str.strip, answer.splitlines()):
        values = [value.strip() for value in line.split(",")]
        try:
            index, uuid, name, driver, persistence, ecc, errors, reasons = values
            bits = 0 if reasons.startswith("[") else int(reasons, 16)
            found.append(
                GpuState(
                    index=int(index),
                    uuid=uuid,
                    name=name,
                    driver=driver,
                    persistence=_switch(persistence),
                    ecc=_switch(ecc),
                    ecc_errors=int(errors) if errors.isdecimal() else None,
                    slowdowns=tuple(text for bit, text in _SLOWDOWNS.items() if bits & bit),
                )
            )
        except ValueError:
            raise Problem("nvidia-smi answers in a way that is not known", line) from None
    return found


def _switch(text: str) -> bool | None:
    """`Enabled`, `Disabled`, or `[N/A]` and other ways of saying nothing."""
    return {"enabled": True, "disabled": False}.get(text.lower())
