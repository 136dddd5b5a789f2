#!/bin/bash
# The programs of Slurm that submitit calls, by the name under which this one runs, for jobs on this machine.
# $FAKE_SLURM: a folder with a file for each job, which has the number of its process group.
set -u
case $(basename "$0") in
sbatch)
    if grep -q -- "--partition=closed$" "$1"; then
        echo "sbatch: error: invalid partition specified: closed" >&2
        exit 1
    fi
    job=1
    while [ -e "$FAKE_SLURM/$job" ]; do job=$((job + 1)); done
    export SLURM_JOB_ID=$job SLURM_JOB_NUM_NODES=1 SLURM_NTASKS=1 SLURM_NODEID=0 SLURM_PROCID=0 SLURM_LOCALID=0
    if [ -n "${FAKE_SLURM_IS_FULL-}" ]; then
        echo PENDING >"$FAKE_SLURM/$job.state"
        touch "$FAKE_SLURM/$job"
    else
        setsid bash -c "bash '$1'; echo COMPLETED >'$FAKE_SLURM/$job.state'" </dev/null >/dev/null 2>&1 &
        echo $! >"$FAKE_SLURM/$job"
    fi
    echo "Submitted batch job $job"
    ;;
srun)
    while [[ $1 == --* ]]; do
        [ "$1" = --output ] && { output=${2//%j/$SLURM_JOB_ID} && output=${output//%t/0}; shift; }
        shift
    done
    exec "$@" >"$output" 2>&1
    ;;
scancel)
    touch "$FAKE_SLURM/$1.cancelled"
    group=$(cat "$FAKE_SLURM/$1")
    if [ -n "$group" ]; then kill -TERM -- "-$group"; else rm "$FAKE_SLURM/$1.state"; fi
    ;;
sacct)
    echo "JobID|State|NodeList"
    for file in "$FAKE_SLURM"/*; do
        job=$(basename "$file")
        [ "$job" = "${job%.*}" ] || continue
        group=$(cat "$file")
        if [ -e "$file.state" ]; then
            state=$(cat "$file.state")
        elif [ -n "$group" ] && kill -0 -- "-$group" 2>/dev/null; then
            state=RUNNING
        elif [ -e "$file.cancelled" ]; then
            state="CANCELLED by 0"
        else
            state=NODE_FAIL
        fi
        echo "$job|$state|localhost"
    done
    ;;
esac
