"""vLLM's plugin as a folder of an export: on PYTHONPATH it is installed, and a server needs no checkout."""

import shutil
from pathlib import Path

import megatron_eagle
from megatron_eagle.hf_model import vllm_plugin
from megatron_eagle.hf_model.vllm_plugin.export import NAME

_FOLDER, _PACKAGE = "vllm_plugin", "eagle2_5_vllm"
_CODE = Path(vllm_plugin.__file__).parent


def write_plugin(folder: Path) -> None:
    """Into the export `folder`: the plugin's files, and what tells Python of its entry point."""
    package = folder / _FOLDER / _PACKAGE
    package.mkdir(parents=True, exist_ok=True)
    for path in sorted(_CODE.glob("*.py")):
        shutil.copyfile(path, package / path.name)
    installed = folder / _FOLDER / f"{_PACKAGE}.dist-info"
    installed.mkdir(exist_ok=True)
    metadata = f"Metadata-Version: 2.1\nName: {_PACKAGE}\nVersion: {megatron_eagle.__version__}\n"
    (installed / "METADATA").write_text(metadata, encoding="utf-8")
    entry = f"[vllm.general_plugins]\n{NAME} = {_PACKAGE}:register\n"
    (installed / "entry_points.txt").write_text(entry, encoding="utf-8")
