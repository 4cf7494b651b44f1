#!/usr/bin/env bash
# lmms-eval and VLMEvalKit over the packages of .venv, its torch among them:  environment.sh PYTHON_OF_VENV DIR
set -euo pipefail
python=$1 folder=$2
echo "[kits] lmms-eval 0.7.3 and VLMEvalKit (ms-vlmeval 0.0.20) into $folder, once: 1.0 GB, 1 to 4 minutes and its download"
began=$SECONDS
rm -rf "$folder"
"$python" -m venv "$folder"
pip() { "$folder/bin/python" -m pip --disable-pip-version-check "$@"; }
purelib='import sysconfig; print(sysconfig.get_path("purelib"))'
packages=$("$folder/bin/python" -c "$purelib")
# Read behind what is installed here; pip leaves it alone, and installs anew what the kits need in another version.
echo "import site; site.addsitedir('$("$python" -c "$purelib")')" > "$packages/venv.pth"
# What the kits import for models behind an API. What they declare beside it (sentence-transformers, lpips, a CUDA
# build of torchvision) is for models on a GPU and for single benchmarks.
{ pip install --quiet \
  'filelock<3.20' 'av<16' decord==0.6.0 wandb==0.25.0 openai==3.57.0 httpx==0.28.1 datasets==5.2.0 evaluate==0.4.6 \
  pandas==3.1.1 openpyxl==3.1.5 xlsxwriter==3.3.1 scikit-learn==1.9.1 opencv-python-headless==5.0.0.93 nltk==3.10.4 \
  sacrebleu==2.6.0 pycocoevalcap==1.2 math-verify==0.9.0 pylatexenc==2.11 zss==1.2.0 \
  loguru==0.7.3 jsonlines==4.0.0 numexpr==2.14.2 pytablewriter==1.2.1 tqdm-multiprocess==0.0.11 zstandard==0.25.0 \
  tenacity==9.2.1 tiktoken==0.14.0 hf_transfer==0.1.9 ftfy==6.3.1 peft==0.21.2 termcolor==3.3.0 validators==0.36.0 \
  sty==1.0.6 timeout-decorator==0.5.0 Levenshtein==0.27.5 jieba==0.42.1 rouge==1.0.1 json_repair==0.64.6 \
  num2words==0.5.14 portalocker==4.4.2 tabulate==0.10.0
  pip install --quiet --no-deps lmms-eval==0.7.3 ms-vlmeval==0.0.20 qwen-vl-utils==0.0.14 torchvision==0.28.0 timm==1.0.31
} 2> >(grep -vE "not installed\.$|is incompatible|but you have|resolver does not" >&2)
# Only torchvision's Python is needed, which resizes frames; its operators are built for another torch.
sed -i -E 's/^@torch.library.register_fake\("torchvision::(\w+)"\)$/@(torch.library.register_fake("torchvision::\1") if torchvision.extension._has_ops() else (lambda f: f))/' \
  "$packages/torchvision/_meta_registrations.py"
echo "[kits] ready: $(du -sh "$folder" | cut -f1), $(((SECONDS - began + 30) / 60)) minutes"
