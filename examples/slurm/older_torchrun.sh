#!/usr/bin/env bash
# A torchrun of before torch 2.12, on each node of train.sbatch: older_torchrun.sh PYTHON -m torch.distributed.run ...
#
# SIGUSR1 would end such a torchrun at once, and 30 s after a SIGTERM it kills the training processes. Here it ignores
# SIGUSR1, and this shell passes it to the training processes, which take it while they train and ignore it before and
# after: so it is passed on until they have ended.
set -uo pipefail

(trap '' USR1 && exec "$@") &
torchrun=$!
told=
trap 'told=yes' USR1
trap 'kill -TERM "$torchrun"' TERM
pass_on='
import signal, sys, psutil
for process in psutil.Process(int(sys.argv[1])).children():
    process.send_signal(signal.SIGUSR1)
'
while kill -0 "$torchrun" 2>/dev/null; do
    [[ -z $told ]] || "$1" -c "$pass_on" "$torchrun" 2>/dev/null # it may have ended meanwhile
    sleep 1 &
    wait $! # a signal ends it early
done
wait "$torchrun"
