#!/usr/bin/env bash
# Serve an exported model with vLLM, OpenAI-compatible:  tools/serve_vllm.sh H [more of vllm serve's options]
# HOST (127.0.0.1), PORT (8000) and MAX_IMAGES per request (256; a video's frames count) come from the environment.
set -euo pipefail

fail() { echo "error: $*" >&2; exit 2; }

[ $# -ge 1 ] || fail "usage: tools/serve_vllm.sh H [options of vllm serve]; H: a folder that convert_hf.py export wrote"
model=$1; shift
for file in config.json configuration_eagle2_5_vl.py tokenizer_config.json chat_template.jinja; do
  [ -f "$model/$file" ] || fail "$model: no $file; name a folder that convert_hf.py export wrote, with a tokenizer"
done
command -v vllm >/dev/null || fail "vllm is not installed here (made for 0.33)"

# String format: vLLM writes its own placeholder <image> where a picture stands, and the folder's template takes the
# turn as text. In the other format the template would write <image-1>, which vLLM does not know.
exec vllm serve "$model" --trust-remote-code --served-model-name eagle2.5 \
  --host "${HOST:-127.0.0.1}" --port "${PORT:-8000}" \
  --chat-template "$model/chat_template.jinja" --chat-template-content-format string --interleave-mm-strings \
  --limit-mm-per-prompt "{\"image\": ${MAX_IMAGES:-256}}" "$@"
