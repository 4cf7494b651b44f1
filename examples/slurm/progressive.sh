#!/usr/bin/env bash
# All stages of a file as a chain of jobs, each after the one before has finished well:
#   examples/slurm/progressive.sh CONFIG [options of sbatch]
# The jobs run in REPO (default: where this is called), and CONFIG is a path there.
# A stage that is finished passes at once, so the same command picks up a broken chain.
# Nodes that a stage has left out the next one leaves out, too.
# The jobs are called eagle-RUN-STAGE, RUN being the folder of checkpoint.path. MAIL_USER hears by mail of MAIL_TYPE
# (default FAIL,END).
set -euo pipefail

config=${1:?usage: progressive.sh CONFIG [options of sbatch]}
shift
command -v sbatch >/dev/null || {
    echo "progressive.sh: no sbatch on $(hostname): call it where jobs of Slurm are submitted" >&2
    exit 2
}
# Slurm ends a job without a word where the folder of its output is missing.
given=("$@")
for i in "${!given[@]}"; do
    case ${given[i]} in
        --output=* | --error=*) file=${given[i]#*=} ;;
        --output | --error | -[oe]) file=${given[i + 1]:-} ;;
        -[oe]*) file=${given[i]:2} ;;
        *) continue ;;
    esac
    folder=$(dirname -- "$file")
    [[ $folder == *%* || -d $folder ]] || {
        echo "${given[i]}: no folder $folder for the job's output: make it first" >&2
        exit 2
    }
done
here=$(cd "$(dirname "$0")" && pwd)
stages=$(cd "${REPO:-.}" && "${PYTHON:-python}" -c '
import sys
from pathlib import Path
from megatron_eagle.config import load_yaml
from megatron_eagle.errors import run_cli
from megatron_eagle.training.stage_settings import stage_names

def main():
    checkpoint = load_yaml(sys.argv[1]).get("checkpoint")
    path = checkpoint.get("path") if isinstance(checkpoint, dict) else None
    print(Path(path or "run").name, *stage_names(sys.argv[1]), sep="\n")

run_cli(main)
' "$config")
run=${stages%%$'\n'*}
stages=${stages#*$'\n'}
mail=()
[[ -z ${MAIL_USER:-} ]] || mail=(--mail-user="$MAIL_USER" --mail-type="${MAIL_TYPE:-FAIL,END}")

previous=
while read -r stage; do
    after=()
    [[ -z $previous ]] || after=(--dependency="afterok:$previous" --kill-on-invalid-dep=yes)
    # By AFTER_JOB a stage knows which nodes the one before has left out, and not the user.
    previous=$(AFTER_JOB=$previous sbatch --parsable --job-name="eagle-$run-$stage" "${mail[@]}" "${after[@]}" "$@" \
        "$here/train.sbatch" "$config" --stage "$stage")
    previous=${previous%%;*} # --parsable may add the cluster
    echo "$stage: job $previous"
done <<<"$stages"
