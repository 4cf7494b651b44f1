#!/usr/bin/env bash
# Where the commands of a job's steps run, in a container or not: a function for all scripts.
#
# They source this file in the repository, and have a function `fail`. Settings:
#   NETWORK            a file of the cluster's network, read on every node: see network.sh
#   CONTAINER_IMAGE    run in this image: with Pyxis where srun has --container-image, else with Apptainer, and for .sif
#   CONTAINER_MOUNTS   what it sees besides the repository, `/data,/scratch:/scratch`

# make_place FOLDER...: leave in `place` what stands in front of a command, after the options of srun. A container sees
# these folders.
make_place() {
    local mounts program seen=("$@")
    place=()
    if [[ -n ${NETWORK:-} ]]; then
        [[ -r $NETWORK ]] || fail "NETWORK=$NETWORK: cannot read this file on $(hostname)"
        NETWORK=$(realpath "$NETWORK")
        export NETWORK
        seen+=("$NETWORK")
    fi
    if [[ -n ${CONTAINER_IMAGE:-} ]]; then
        mounts=$(printf '%s\n' "${seen[@]}" | sed 's/.*/&:&/' | paste -sd, -)${CONTAINER_MOUNTS:+,$CONTAINER_MOUNTS}
        if [[ $CONTAINER_IMAGE != *.sif ]] && [[ $(srun --help) == *--container-image* ]]; then
            echo "container: $CONTAINER_IMAGE, with Pyxis"
            place+=(--container-image="$CONTAINER_IMAGE" --container-workdir="$PWD" --container-mounts="$mounts")
        else
            program=$(command -v apptainer || command -v singularity) ||
                fail "CONTAINER_IMAGE=$CONTAINER_IMAGE: neither Pyxis (srun --container-image) nor apptainer is here"
            echo "container: $CONTAINER_IMAGE, with $program"
            place+=("$program" exec)
            [[ -z ${SLURM_GPUS_ON_NODE:-} ]] || place+=(--nv)
            place+=(--pwd "$PWD" --bind "$mounts" "$CONTAINER_IMAGE")
        fi
    fi
    # shellcheck disable=SC2016  # the nodes expand it
    [[ -z ${NETWORK:-} ]] || place+=(bash -c '
        [[ -r $NETWORK ]] || { echo "NETWORK=$NETWORK: cannot read this file on $(hostname)" >&2; exit 2; }
        source "$NETWORK"
        exec "$@"' network)
}
