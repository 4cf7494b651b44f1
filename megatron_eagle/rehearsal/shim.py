"""The C++ part of the machine that is not there: compiled on first use, loaded before torch is imported."""

import ctypes
import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from megatron_eagle.errors import UserError

SOURCE = Path(__file__).with_name("fake_cuda.cpp")


def shim_file() -> Path:
    """The compiled library for this torch; compiled here if nobody has yet.

    Raises:
        UserError: no torch, no compiler, or a torch that it does not compile with.
    """
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise UserError("rehearse: torch is not installed")
    torch = Path(spec.origin).parent
    key = hashlib.sha256(SOURCE.read_bytes() + importlib.metadata.version("torch").encode() + bytes(torch))
    file = _cache() / f"fake_cuda-{key.hexdigest()[:16]}.so"
    if not file.exists():
        _compile(torch, file)
    return file


def load_shim() -> None:
    """Load it into this process, which has not imported torch yet.

    Raises:
        UserError: as `shim_file`.
    """
    assert "torch" not in sys.modules, "torch has looked for CUDA already"
    ctypes.CDLL(str(shim_file()), ctypes.RTLD_GLOBAL)


def _cache() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root, "megatron_eagle")


def _compile(torch: Path, file: Path) -> None:
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("g++", "clang++", "c++")), None)
    if compiler is None or shutil.which(compiler) is None:
        named = f" CXX names {compiler!r}, which is not here." if compiler else ""
        raise UserError(
            f"rehearse: needs a C++20 compiler once, to build {SOURCE.name}, and found none.{named} Install "
            "g++ or clang++, or set CXX"
        )
    lib = torch / "lib"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=file.parent) as folder:
            built = Path(folder, file.name)
            command = [compiler, "-shared", "-fPIC", "-std=c++20", "-O0", "-w", f"-I{torch / 'include'}"]
            command += [
                str(SOURCE),
                "-o",
                str(built),
                f"-L{lib}",
                "-lc10",
                "-ltorch_cpu",
                f"-Wl,-rpath,{lib}",
            ]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                last = (done.stderr.strip() or "no message").splitlines()[0]
                raise UserError(f"rehearse: {compiler} cannot build {SOURCE} for this torch: {last}")
            built.replace(file)
    except OSError as error:
        raise UserError(
            f"rehearse: {file.parent} cannot be written ({error.strerror}): set XDG_CACHE_HOME"
        ) from error
