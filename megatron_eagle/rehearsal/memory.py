"""Device memory that is alive, by the storages of tensors without data."""

import weakref
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import Tensor

from megatron_eagle.rehearsal.places import place

ROUNDING = 512  # bytes, of torch's caching allocator (c10/cuda/CUDACachingAllocator.h: kMinBlockSize)
_NAMED = 1 << 20  # from this size on a storage's birthplace is kept


def rounded(nbytes: int) -> int:
    """As the allocator gives it."""
    return -(-nbytes // ROUNDING) * ROUNDING


@dataclass
class Peak:
    """The most of one phase of a step."""

    nbytes: int = 0
    place: str = ""
    by_kind: dict[str, int] = field(default_factory=dict)
    by_birth: list[tuple[str, int]] = field(default_factory=list)  # the largest of what has no kind


class Memory:
    """Bytes alive now, and at most in each phase. Kinds are told by `name`; the rest is the step's own."""

    def __init__(self) -> None:
        self.now, self.phase, self.peaks = 0, "start", dict[str, Peak]()
        self._sizes: dict[int, int] = {}
        self._births: dict[int, str] = {}
        self._kinds: dict[int, str] = {}
        self._watch: dict[int, weakref.ref[object]] = {}
        self._looked = 0

    def begin(self, phase: str) -> None:
        """What is alive now is the least that the phase has."""
        self.phase, self._looked = phase, 0
        self.peaks.setdefault(phase, Peak())
        self._reached(self.now)

    def see(self, tensor: Tensor) -> None:
        """A tensor's storage, old or new."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._sizes:
            return
        size = rounded(storage.nbytes())
        self._sizes[key] = size
        self._watch[key] = weakref.ref(storage, lambda _: self._gone(key))
        self.now += size
        self._births[key] = place(3) if size >= _NAMED else "small tensors"
        self._reached(self.now)

    def passing(self, size: int, what: str) -> None:
        """A kernel's workspace, which is gone when it returns."""
        self._reached(self.now + rounded(size), extra=(what, rounded(size)))

    def name(self, kind: str, tensors: Iterable[Tensor]) -> None:
        """These tensors' storages are of a kind, unless they have one."""
        for tensor in tensors:
            self._kinds.setdefault(tensor.untyped_storage()._cdata, kind)

    def _gone(self, key: int) -> None:
        self.now -= self._sizes.pop(key)
        del self._births[key], self._watch[key]
        self._kinds.pop(key, None)

    def _reached(self, nbytes: int, extra: tuple[str, int] | None = None) -> None:
        peak = self.peaks.setdefault(self.phase, Peak())
        if nbytes <= peak.nbytes:
            return
        peak.nbytes = nbytes
        if nbytes > self._looked * 1.005:  # a look at all storages for every new byte would be slow
            self._looked, peak.place = nbytes, place(3)
            kinds: Counter[str] = Counter()
            births: Counter[str] = Counter()
            for key, size in self._sizes.items():
                kind = self._kinds.get(key, "activations and workspaces")
                kinds[kind] += size
                if key not in self._kinds:
                    births[self._births[key]] += size
            if extra is not None:
                kinds["activations and workspaces"] += extra[1]
                births[extra[0]] += extra[1]
            peak.by_kind, peak.by_birth = dict(kinds), births.most_common(12)
