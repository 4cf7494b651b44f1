#!/usr/bin/env bash
# Serve an exported model with vLLM, OpenAI-compatible:  tools/serve_vllm.sh H [--stock | --follow C] [options of vllm serve]
# H brings a plugin (H/vllm_plugin): prompts, tiles and frames are those of training. With --stock they are vLLM's own.
# With --follow, H is made of the newest checkpoint in C and again of each one that a run finishes there; the running
# server loads it between two answers. $MEGATRON_EAGLE (megatron-eagle) is the command in the training's environment.
# From the environment: HOST (127.0.0.1), PORT (8000); MAX_IMAGES (512) and MAX_VIDEOS (8) of a request, where a stock
# server takes a video as pictures; MAX_FRAMES of a video and MAX_TILES of a picture (the export's own), for
# which memory is kept and which a request gets that asks for nothing else.
# Prompts with their answers have at most the tokens that the model was trained for (max_position_embeddings of its
# config.json); --max-model-len may ask for less, and for more only with VLLM_ALLOW_LONG_MAX_MODEL_LEN=1, vLLM's own.
set -euo pipefail

fail() { echo "error: $*" >&2; exit 2; }

[ $# -ge 1 ] || fail "usage: tools/serve_vllm.sh H [--stock | --follow C] [options of vllm serve]; H: a folder that convert_hf.py export wrote"
model=$1; shift
stock=
[ "${1:-}" != --stock ] || { stock=1; shift; }
followed=
if [ "${1:-}" = --follow ]; then
  [ -z "$stock" ] || fail "--follow: a stock server takes no new weights; leave --stock out"
  [ $# -ge 2 ] || fail "--follow: name the run's checkpoint folder"
  followed=$2; shift 2
  [[ " $*" != *" --port"* && " $*" != *" --host"* ]] || fail "--follow: set HOST and PORT in the environment"
  eagle=${MEGATRON_EAGLE:-megatron-eagle}
  command -v "$eagle" >/dev/null ||
    fail "$eagle: not found; --follow exports with it: name the training environment's in MEGATRON_EAGLE"
  "$eagle" convert follow --checkpoint "$followed" --hf "$model" --once
fi
for file in config.json configuration_eagle2_5_vl.py tokenizer_config.json chat_template.jinja; do
  [ -f "$model/$file" ] || fail "$model: no $file; name a folder that convert_hf.py export wrote, with a tokenizer"
done
[ -n "$stock" ] || [ -d "$model/vllm_plugin" ] ||
  fail "$model: no vllm_plugin; export it again, or serve it with --stock, not as it was trained"
command -v vllm >/dev/null || fail "vllm is not installed here (made for 0.32 and 0.33)"

for name in MAX_IMAGES MAX_VIDEOS MAX_FRAMES MAX_TILES; do
  [[ ${!name:-1} =~ ^[1-9][0-9]*$ ]] || fail "$name=${!name}: expected a whole number of at least 1"
done
[ -z "$stock" ] || [ -z "${MAX_FRAMES:-}${MAX_TILES:-}" ] ||
  fail "MAX_FRAMES and MAX_TILES: a stock server cuts pictures by its own rule and takes frames as pictures (MAX_IMAGES)"

trained=$(python3 -c 'import json, sys; print(json.load(open(sys.argv[1]))["text_config"]["max_position_embeddings"])' \
  "$model/config.json" 2>/dev/null) || fail "$model/config.json: no max_position_embeddings in its text_config"
length=(--max-model-len "$trained")
for ((i = 1; i <= $#; i++)); do
  case ${!i} in
    --max[-_]model[-_]len=*) asked=${!i#*=} ;;
    --max[-_]model[-_]len) next=$((i + 1)); asked=${!next:-} ;;
    *) continue ;;
  esac
  length=() # another way to write a number is left to vLLM, which refuses more than the model's as well
  [[ $asked =~ ^([0-9]+)([kK]?)$ ]] || continue
  case ${BASH_REMATCH[2]} in k) unit=1000 ;; K) unit=1024 ;; *) unit=1 ;; esac
  ((10#${BASH_REMATCH[1]} * unit > trained)) || continue
  beyond="--max-model-len $asked is beyond the $trained tokens that the model was trained for (max_position_embeddings)"
  [ "${VLLM_ALLOW_LONG_MAX_MODEL_LEN:-0}" = 1 ] || fail "$beyond: ask for less, or set VLLM_ALLOW_LONG_MAX_MODEL_LEN=1"
  echo "warning: $beyond: answers may be worse" >&2
done

if [ -n "$stock" ]; then
  export VLLM_PLUGINS=""
  # String format: vLLM writes its own placeholder <image> where a picture stands, and the folder's template takes the
  # turn as text. In the other format the template would write <image-1>, which vLLM does not know.
  ways=(--chat-template-content-format string --interleave-mm-strings
    --limit-mm-per-prompt "{\"image\": ${MAX_IMAGES:-512}}")
else
  export PYTHONPATH="$(realpath "$model")/vllm_plugin${PYTHONPATH:+:$PYTHONPATH}" VLLM_MEDIA_CONNECTOR=eagle2_5
  [ ! -f "$model/certificate.json" ] || python3 -m eagle2_5_vllm.certificate "$model" >&2
  [ -z "${VLLM_PLUGINS+set}" ] || export VLLM_PLUGINS="$VLLM_PLUGINS,eagle2_5"
  # Requests may set tiles; the plugin refuses what no prompt can hold.
  ways=(--tokenizer-mode eagle2_5 --chat-template-content-format openai --trust-request-mm-kwargs
    --middleware eagle2_5_vllm.settings.ExportSettings
    --limit-mm-per-prompt
    "{\"image\": ${MAX_IMAGES:-512}, \"video\": {\"count\": ${MAX_VIDEOS:-8}${MAX_FRAMES:+, \"num_frames\": $MAX_FRAMES}}}")
  [ -z "${MAX_FRAMES:-}" ] || ways+=(--media-io-kwargs "{\"video\": {\"max_frames\": $MAX_FRAMES}}")
  [ -z "${MAX_TILES:-}" ] || ways+=(--mm-processor-kwargs "{\"max_dynamic_tiles\": $MAX_TILES}")
fi

serve=(vllm serve "$model" --trust-remote-code --served-model-name eagle2.5 \
  --host "${HOST:-127.0.0.1}" --port "${PORT:-8000}" \
  --chat-template "$model/chat_template.jinja" "${ways[@]}" "${length[@]}" "$@")
[ -n "$followed" ] || exec "${serve[@]}"

# Both know the secret, and end together.
EAGLE_RELOAD_SECRET=$(python3 -c 'import secrets; print(secrets.token_hex())'); export EAGLE_RELOAD_SECRET
near=${HOST:-127.0.0.1}; [ "$near" != 0.0.0.0 ] || near=127.0.0.1
"${serve[@]}" --middleware eagle2_5_vllm.reload.Reloading \
  --worker-extension-cls eagle2_5_vllm.reload_worker.ReloadWorker & server=$!
"$eagle" convert follow --checkpoint "$followed" --hf "$model" \
  --endpoint "http://$near:${PORT:-8000}" & follower=$!
trap 'kill $server $follower 2>/dev/null || true; wait' EXIT
trap 'exit 143' TERM; trap 'exit 130' INT
wait -n
