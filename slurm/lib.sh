# shellcheck shell=bash
# Shared by all templates. A job is a chain of attempts: it stops with a checkpoint before its time limit or when it is
# preempted, is requeued by SLURM, and continues from the checkpoint, until the run is finished. See docs/slurm.md. The state
# of a chain is in RUN/slurm/:
#
#   attempt        number of the last attempt            done        the run is finished: later jobs end immediately
#   outcome        how the last attempt ended            excluded    nodes that failed their health check
#   failed_at      checkpoint of the last failure        cancel.JOB  `orpo-dist cancel` was called
#   submission     the job or chain that ran last: failed_at and excluded are of one
#   chain.ID       a chain of jobs that failed permanently
#   logs/          JOB.ATTEMPT.nodeN.log                 exit/, health/   exit code and health of each node, per attempt

set -uo pipefail

# A profile may leave out what it does not need.
: "${SITE_CACHE=}" "${SITE_SCRATCH=}" "${SITE_SHARED_FOLDERS=}" "${SITE_LOCAL_FOLDERS=}" "${SITE_MAX_RESTARTS=20}"
: "${SITE_CONTAINER_RUNTIME=}" "${SITE_CONTAINER_IMAGE=}" "${SITE_CONTAINER_MOUNTS=}"
declare -F site_setup >/dev/null || site_setup() { :; }
declare -F site_health_check >/dev/null || site_health_check() { :; }

# Exit codes of a run (docs/runs.md).
BAD_INPUT=2 NOT_FINITE=3 STOPPED=75

say() { printf '%s orpo-dist: %s\n' "$(date '+%F %T')" "$*"; }

fail() { # fail CODE MESSAGE: end the job without a restart
    say "error: $2" >&2
    if [ -d "${STATE-}" ]; then
        echo "failed ($1): $2" >"$STATE/outcome"
        [ -z "${CHAIN-}" ] || echo "$2" >"$STATE/chain.$CHAIN"
    fi
    exit "$1"
}

# --- the environment ---------------------------------------------------------------------------------------------

check_slurm() { # srun has --overlap since 20.11
    local version
    version=$(srun --version 2>/dev/null) version=${version##* }
    [[ $version =~ ^([0-9]+)\.([0-9]+) ]] || return 0
    [ "${BASH_REMATCH[1]}${BASH_REMATCH[2]}" -ge 2011 ] ||
        fail "$BAD_INPUT" "SLURM $version is too old: the templates need 20.11 or newer."
}

set_environment() {
    check_slurm
    site_setup || fail 1 "site_setup of the site profile failed."
    PYTHON=${PYTHON:-python}
    # Since SLURM 22.05, srun does not inherit the job's --cpus-per-task.
    [ -z "${SLURM_CPUS_PER_TASK-}" ] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
    [ -z "$SITE_CACHE" ] || export HF_HOME=$SITE_CACHE
    # NCCL finds its interfaces on its own; a NCCL_SOCKET_IFNAME set by the user is kept. On a hang, torch's flight recorder
    # writes the last collectives of every rank next to the logs.
    export TORCH_NCCL_DUMP_ON_TIMEOUT=${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}
    export TORCH_FR_BUFFER_SIZE=${TORCH_FR_BUFFER_SIZE:-2000}
    export PYTHONUNBUFFERED=1 PYTHONFAULTHANDLER=1
    [ "${PROCESSES:-0}" -gt 0 ] || PROCESSES=1
    local cpus=${SLURM_CPUS_PER_TASK:-1}
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cpus > PROCESSES ? cpus / PROCESSES : 1))}
    set_container
}

# SRUN_CONTAINER goes to srun (pyxis), IN_CONTAINER before the command (apptainer).
set_container() {
    SRUN_CONTAINER=() IN_CONTAINER=()
    local runtime=${CONTAINER_RUNTIME:-$SITE_CONTAINER_RUNTIME} image=${CONTAINER_IMAGE:-$SITE_CONTAINER_IMAGE}
    local mounts=$SITE_CONTAINER_MOUNTS
    [ -n "$runtime" ] || return 0
    [ -n "$image" ] || fail "$BAD_INPUT" "SITE_CONTAINER_IMAGE of the site profile names no image."
    mounts=${mounts:+$mounts,}$PWD:$PWD
    case $runtime in
    pyxis)
        SRUN_CONTAINER=(--container-image="$image" --container-mounts="$mounts" --container-workdir="$PWD" --no-container-mount-home)
        ;;
    apptainer)
        [ -e "$image" ] || [[ $image == *://* ]] || fail "$BAD_INPUT" "the container image $image is not there."
        IN_CONTAINER=(apptainer exec --bind "$mounts" --pwd "$PWD")
        [ "$GPUS" = 0 ] || IN_CONTAINER+=(--nv)
        IN_CONTAINER+=("$image")
        ;;
    *) fail "$BAD_INPUT" "SITE_CONTAINER_RUNTIME=$runtime: pyxis and apptainer are known." ;;
    esac
}

on_head() { # run a command in the environment of the run, on one node
    if [ ${#SRUN_CONTAINER[@]} -gt 0 ]; then
        srun --nodes=1 --ntasks=1 --overlap "${SRUN_CONTAINER[@]}" "$@"
    else
        ${IN_CONTAINER[@]+"${IN_CONTAINER[@]}"} "$@"
    fi
}

# --- state of the chain --------------------------------------------------------------------------------------

open_run() { # open_run RECIPE [--field value ...]: RUN, STATE, LOGS and the number of this attempt
    [ $# -gt 0 ] || fail "$BAD_INPUT" "usage: sbatch TEMPLATE recipe.yaml [--field value ...]"
    [ -f "$1" ] || fail "$BAD_INPUT" "the recipe $1 does not exist (current folder: $PWD)."
    RUN=$(on_head "$PYTHON" -m orpo_dist.recipe.preview "$@") || fail "$BAD_INPUT" "the recipe $1 cannot be read."
    refuse_local_folder
    STATE=$RUN/slurm LOGS=$RUN/slurm/logs
    mkdir -p "$LOGS" "$STATE/exit" "$STATE/health" || fail "$BAD_INPUT" "cannot write the run's folder $RUN."
    if [ -e "$STATE/done" ]; then
        say "$RUN is finished ($(<"$STATE/done")): nothing to do."
        exit 0
    fi
    # `submit --chain` submits several jobs that run one after the other, instead of one job that is requeued.
    if [ -n "${CHAIN-}" ] && [ -e "$STATE/chain.$CHAIN" ]; then
        say "an earlier job of this chain failed permanently: $(<"$STATE/chain.$CHAIN")"
        exit 1
    fi
    [ "$(cat "$STATE/submission" 2>/dev/null)" = "$(submission)" ] || rm -f "$STATE/excluded"
    submission >"$STATE/submission"
    ATTEMPT=$(($(cat "$STATE/attempt" 2>/dev/null || echo 0) + 1))
    echo "$ATTEMPT" >"$STATE/attempt"
    RESTARTS=${SLURM_RESTART_COUNT:-0}
    # Continue from a checkpoint of an earlier job of this run, or of this job before its restart.
    RESUME=(--resume_from_checkpoint auto)
    [[ " $* " != *" --resume_from_checkpoint"* ]] || RESUME=()
    # `orpo-dist status` finds its jobs by this comment.
    scontrol update JobId="$SLURM_JOB_ID" Comment="orpo-dist:$RUN" >/dev/null 2>&1 || true
    LIMIT_AT=$(date -d "$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/.* EndTime=\([^ ]*\).*/\1/p')" +%s 2>/dev/null) ||
        LIMIT_AT=9999999999 # no limit
    say "job $SLURM_JOB_ID, attempt $ATTEMPT (restart $RESTARTS) of $RUN on $SLURM_JOB_NODELIST"
}

refuse_local_folder() {
    local folder
    for folder in $SITE_SHARED_FOLDERS; do
        [[ $RUN/ != "${folder%/}"/* ]] || return 0
    done
    [ -z "$SITE_SHARED_FOLDERS" ] ||
        fail "$BAD_INPUT" "output_dir $RUN is in none of the shared folders of the site profile ($SITE_SHARED_FOLDERS)."
    for folder in $SITE_LOCAL_FOLDERS; do
        [[ $RUN/ != "${folder%/}"/* ]] ||
            fail "$BAD_INPUT" "output_dir $RUN is on $folder, which is local to each node: checkpoints would be lost."
    done
}

# What was submitted: this job, however often it is requeued, or its chain. Failures and excluded nodes of earlier ones do
# not count: they may have been put right.
submission() { echo "${CHAIN:-$SLURM_JOB_ID}"; }

newest_checkpoint() {
    local marker newest=none best=-1 number
    for marker in "$RUN"/checkpoint-*/complete.json; do
        [ -e "$marker" ] || continue
        number=${marker%/complete.json} number=${number##*checkpoint-}
        [[ $number =~ ^[0-9]+$ ]] && [ "$number" -gt "$best" ] && best=$number newest=checkpoint-$number
    done
    echo "$newest"
}

# --- nodes -----------------------------------------------------------------------------------------------------------

# Runs on every node before training: writes "ok" or the problem to RUN/slurm/health/ATTEMPT.NODE.
# shellcheck disable=SC2317
node_health() { # node_health STATE ATTEMPT GPUS
    local report=$1/health/$2.$SLURMD_NODENAME found
    for _ in $(seq 20); do # a shared file system may show a new file late
        [ -e "$1/health/$2.token" ] && break
        sleep 0.5
    done
    # If the shared folder is missing, no report can be written; check_nodes handles the missing report.
    [ -e "$1/health/$2.token" ] || { echo "does not see $1" >&2; return 1; }
    if [ "$3" -gt 0 ] && command -v nvidia-smi >/dev/null; then
        found=$(timeout 60 nvidia-smi --query-gpu=uuid --format=csv,noheader 2>&1 | grep -c '^GPU-')
        [ "$found" -ge "$3" ] || { echo "nvidia-smi sees $found of $3 GPUs" >"$report"; return 1; }
    fi
    if [ -n "$SITE_SCRATCH" ] && ! { mkdir -p "$SITE_SCRATCH" && [ -w "$SITE_SCRATCH" ]; }; then
        echo "cannot write $SITE_SCRATCH" >"$report"
        return 1
    fi
    site_health_check || { echo "site_health_check failed" >"$report"; return 1; }
    echo ok >"$report"
}

check_nodes() { # BAD_NODES: those that did not report "ok"
    local node report
    BAD_NODES=()
    touch "$STATE/health/$ATTEMPT.token"
    timeout 300 srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --overlap \
        bash -c "$(declare -f); $(declare -p "${!SITE_@}"); site_setup; node_health \"\$@\"" health "$STATE" "$ATTEMPT" "$GPUS" || true
    for node in $(scontrol show hostnames "$SLURM_JOB_NODELIST"); do
        report=$(cat "$STATE/health/$ATTEMPT.$node" 2>/dev/null || echo "gave no report: is $RUN shared?")
        [ "$report" = ok ] || { BAD_NODES+=("$node"); say "node $node: $report"; }
    done
    rm -f "$STATE/health/$ATTEMPT.token"
    [ ${#BAD_NODES[@]} -gt 0 ] || return 0
    [ ${#BAD_NODES[@]} -lt "$SLURM_JOB_NUM_NODES" ] ||
        fail 1 "every node fails its health check: the cause is the check, the run's folder or the site profile, not a node."
    return 1
}

# --- one attempt -----------------------------------------------------------------------------------------------------

# USR1: the time limit, preemption or `orpo-dist cancel` asks the run to stop. TERM: SLURM is ending the job, because of
# scancel, the loss of a node, the end of the preemption grace time, or the limit itself. The traps are set first: with a
# short time limit the signal may be sent immediately.
STOPPING="" ENDED_AT=""
trap 'STOPPING=USR1' USR1
trap 'STOPPING=${STOPPING:-TERM} ENDED_AT=${ENDED_AT:-$(date +%s)}' TERM

# Runs on every node. A stopped run (75) is reported to srun as success, because srun would otherwise kill the nodes that
# are still saving; the real exit code is in the file.
# shellcheck disable=SC2317
node_task() { # node_task EXIT_FOLDER/ATTEMPT SCRATCH COMMAND...
    local report=$1.$SLURM_NODEID scratch=$2 attempt=${1##*/} code
    shift 2
    trap : TERM INT USR1 # SLURM signals the processes too; this shell waits for them
    # shellcheck disable=SC2030
    [ -z "$scratch" ] || { mkdir -p "$scratch" && export TMPDIR=$scratch; }
    printf '=== %s attempt %s on %s (node rank %s)\n' "$(date '+%F %T')" "$attempt" "$SLURMD_NODENAME" "$SLURM_NODEID"
    "${@//@NODE_RANK@/$SLURM_NODEID}"
    code=$?
    echo "$code" >"$report"
    [ "$code" != 75 ] || code=0
    return "$code"
}

run_attempt() { # run_attempt RECIPE [--field value ...]: sets CODE from the exit codes of all nodes
    local step log=$LOGS/$SLURM_JOB_ID.$ATTEMPT.node%n.log launch=(--nodes "$SLURM_JOB_NUM_NODES")
    if [ "$SLURM_JOB_NUM_NODES" -gt 1 ]; then
        launch+=(--node-rank @NODE_RANK@ --head-address "$(head_node)" --port "$(job_port)")
    fi
    launch+=(--processes-per-node "$PROCESSES" --wait 300)
    [ -z "$CONFIG" ] || launch+=(--accelerate-config "$CONFIG")
    [ "$GPUS" != 0 ] || launch+=(--cpu)
    # If two attempts overlap in time, the later one must not connect to the earlier one.
    export PET_RDZV_ID=$SLURM_JOB_ID.$RESTARTS
    export TORCH_NCCL_DEBUG_INFO_TEMP_FILE=$LOGS/$SLURM_JOB_ID.$ATTEMPT.nccl_trace_rank_
    say "logs: ${log/\%n/*}"
    # --wait: when one node has finished, the others have one minute left.
    srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --wait=60 \
        --kill-on-bad-exit=1 --open-mode=append --output="$log" ${SRUN_CONTAINER[@]+"${SRUN_CONTAINER[@]}"} \
        bash -c "$(declare -f node_task); node_task \"\$@\"" node "$STATE/exit/$ATTEMPT" "$SITE_SCRATCH" \
        ${IN_CONTAINER[@]+"${IN_CONTAINER[@]}"} "$PYTHON" -m orpo_dist.cli launch "${launch[@]}" \
        "$@" ${RESUME[@]+"${RESUME[@]}"} &
    step=$!
    while kill -0 "$step" 2>/dev/null; do
        # Repeatedly: a run that is just starting removes the file.
        [ -z "$STOPPING" ] || touch "$RUN/STOP"
        sleep 2 &
        wait $! # returns immediately on a signal
    done
    wait "$step"
    CODE=$(attempt_code $?)
    rm -f "$RUN/STOP"
}

head_node() { scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1; }

# Outside the ephemeral range (32768 and above). Jobs that share a node have numbers close to each other, so a restart moves
# far away, and past what is in use: this script runs on the head node.
job_port() {
    local port=$((10000 + (SLURM_JOB_ID + 6151 * RESTARTS) % 20000))
    for _ in 1 2 3 4 5 6 7 8; do
        (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null || break
        port=$((10000 + (port - 10000 + 3079) % 20000))
    done
    echo "$port"
}

attempt_code() { # attempt_code STEP_CODE: the decisive one of the nodes' exit codes
    local codes code reports=0 stopped="" other=""
    codes=$(cat "$STATE/exit/$ATTEMPT".* 2>/dev/null)
    for code in $codes; do
        reports=$((reports + 1))
        case $code in
        0) ;;
        "$STOPPED") stopped=1 ;;
        *) other=${other:-$code} ;;
        esac
    done
    for code in "$BAD_INPUT" "$NOT_FINITE"; do
        [[ " ${codes//$'\n'/ } " != *" $code "* ]] || { echo "$code"; return; }
    done
    # Stopped only if every node has finished or stopped: one that was killed is a failure, and may have left no report.
    [ -z "$other" ] || { [ "$1" != 0 ] && [ "$1" != "$STOPPED" ] && echo "$1" || echo "$other"; return; }
    if [ -n "$stopped" ] && { [ "$reports" -ge "${SLURM_JOB_NUM_NODES:-1}" ] || [ "$1" = 0 ] || [ "$1" = "$STOPPED" ]; }; then
        echo "$STOPPED"
        return
    fi
    echo "$1"
}

# --- afterwards --------------------------------------------------------------------------------------------------------

conclude() { # finish, fail or restart, depending on CODE
    local newest
    newest=$(newest_checkpoint)
    if [ "$CODE" = 0 ]; then
        date '+%F %T' >"$STATE/done"
        echo finished >"$STATE/outcome"
        say "finished: $RUN"
        exit 0
    fi
    [ "$CODE" = "$STOPPED" ] || show_ends
    if [ -e "$STATE/cancel.$SLURM_JOB_ID" ]; then
        echo "cancelled at $newest" >"$STATE/outcome"
        say "cancelled; newest checkpoint: $newest. Submit the same recipe again to continue."
        scancel "$SLURM_JOB_ID" # so that jobs that depend on this one do not start
        sleep 60
        exit "$CODE"
    fi
    case $CODE in
    "$BAD_INPUT") fail "$CODE" "bad input: a restart would fail in the same way. See the logs." ;;
    "$NOT_FINITE") fail "$CODE" "too many non-finite steps: a restart would fail in the same way. See the logs." ;;
    "$STOPPED")
        if [ -z "$STOPPING" ]; then # a stop file or max_runtime, not SLURM
            echo "stopped at $newest" >"$STATE/outcome"
            say "stopped, not by SLURM; newest checkpoint: $newest. Submit the same recipe again to continue."
            exit "$CODE"
        fi
        restart "stopped for SLURM ($STOPPING) at $newest"
        ;;
    *)
        # One restart per checkpoint: a failure that repeats at the same place would repeat forever.
        if [ "$(cat "$STATE/failed_at" 2>/dev/null)" = "$(submission) $newest" ]; then
            fail "$CODE" "failed twice with no new checkpoint in between (newest: $newest). See the logs."
        fi
        echo "$(submission) $newest" >"$STATE/failed_at"
        restart "failed with exit code $CODE, newest checkpoint: $newest"
        ;;
    esac
}

show_ends() {
    local log
    for log in "$LOGS/$SLURM_JOB_ID.$ATTEMPT".node*.log; do
        [ ! -e "$log" ] || { say "the end of $log:"; tail -n 15 "$log"; }
    done
}

restart() { # restart REASON: SLURM starts this job again, without the nodes in RUN/slurm/excluded
    local limit=${MAX_RESTARTS:-$SITE_MAX_RESTARTS} excluded answer
    if [ -n "${CHAIN-}" ]; then
        echo "waiting for the next job of the chain: $1" >"$STATE/outcome"
        say "$1; the next job of the chain continues."
        exit "$STOPPED"
    fi
    # After scancel, a requeue would undo the cancellation, and SLURM shows the same state (COMPLETING) in every case. After a
    # preemption or the loss of a node SLURM restarts the job on its own. It does not after the time limit, whose time is known.
    if [ -n "$ENDED_AT" ] && [ "$ENDED_AT" -lt $((LIMIT_AT - 5)) ]; then
        echo "ended by SLURM: $1" >"$STATE/outcome"
        say "$1; SLURM has ended the job, and restarts it unless it was cancelled. Submitting the recipe again also continues the run."
        exit "$STOPPED"
    fi
    [ "$RESTARTS" -lt "$limit" ] || fail 1 "$1; already restarted $RESTARTS times, the limit (SITE_MAX_RESTARTS)."
    echo "restarting: $1" >"$STATE/outcome"
    say "$1; restarting."
    trap '' TERM USR1 # a requeue ends this script, possibly before the excluded nodes are set
    if ! answer=$(scontrol requeue "$SLURM_JOB_ID" 2>&1); then
        # After the loss of a node, SLURM has already requeued the job while its processes were ending.
        [[ $answer == *"pending execution"* ]] ||
            fail 1 "$1; SLURM does not requeue ($answer): submit a chain instead (orpo-dist submit --chain 5)."
        say "SLURM has already requeued the job."
    fi
    excluded=$(sort -u "$STATE/excluded" 2>/dev/null | paste -sd, -)
    if [ -n "$excluded" ]; then
        scontrol update JobId="$SLURM_JOB_ID" ExcNodeList="$excluded" && say "without $excluded"
    fi
    sleep 60 # until SLURM ends this script
    exit 0
}

# --- called by the templates -----------------------------------------------------------------------------------------------

train() { # train RECIPE [--field value ...]
    set_environment
    open_run "$@"
    # A training job reads what a prefetch job or an earlier run has put into the cache (HF_HUB_OFFLINE=0 allows downloads).
    export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1}
    if ! check_nodes; then
        printf '%s\n' "${BAD_NODES[@]}" >>"$STATE/excluded"
        restart "unhealthy: ${BAD_NODES[*]}"
    fi
    run_attempt "$@"
    conclude
}

sweep() { # sweep RECIPE SWEEP_FILE [--field value ...]: line i of the file has the flags of array task i, from 0
    local recipe=${1-} file=${2-} word words=() folder index=${SLURM_ARRAY_TASK_ID-}
    [ -f "$file" ] || fail "$BAD_INPUT" "usage: sbatch --array=0-N sweep.sbatch recipe.yaml sweep.txt"
    [ -n "$index" ] || fail "$BAD_INPUT" "not an array job: sbatch --array=0-N $*"
    shift 2
    set_environment
    folder=$(on_head "$PYTHON" -m orpo_dist.recipe.preview "$recipe" "$@") || fail "$BAD_INPUT" "the recipe $recipe cannot be read."
    while IFS= read -r -d '' word; do
        words+=("$word")
    done < <(on_head "$PYTHON" -m orpo_dist.cluster.sweep "$file" "$index")
    [ ${#words[@]} -gt 0 ] || fail "$BAD_INPUT" "run $index of $file cannot be read."
    train "$recipe" "$@" "${words[@]}" --output_dir "$folder/$index"
}

prefetch() { # prefetch RECIPE [--field value ...]: put model, rows and tokenised pairs into the shared cache
    [ $# -gt 0 ] || fail "$BAD_INPUT" "usage: sbatch prefetch.sbatch recipe.yaml [--field value ...]"
    GPUS=0
    set_environment
    on_head "$PYTHON" -m orpo_dist.cli prefetch "$@"
    exit $?
}
