#!/usr/bin/env bash
# A real SLURM on one Debian box, as root and without systemd: munge, slurmctld and three slurmd (n1, n2 and the spare n3).
#
#   two_nodes.sh packages        install what is missing (apt)
#   two_nodes.sh up FOLDER       start; FOLDER/slurm.conf is the configuration: export SLURM_CONF=FOLDER/slurm.conf
#   two_nodes.sh down FOLDER     end every daemon and job that `up` started, and take the names out of /etc/hosts again
#
# Partitions: low (default; may be preempted by high), high, and spare with a third node. All state is in FOLDER.
set -euo pipefail

NAMES="127.0.0.1 n1 n2 n3 # orpo-dist test cluster"
NODES=(n1 n2 n3)

die() { echo "two_nodes.sh: $*" >&2; exit 1; }

packages() {
    local wanted=()
    command -v slurmctld >/dev/null && command -v slurmd >/dev/null || wanted+=(slurm-wlm)
    command -v munged >/dev/null || wanted+=(munge)
    command -v ip >/dev/null || wanted+=(iproute2)
    [ ${#wanted[@]} -gt 0 ] || { echo "slurm, munge and ip are there"; return; }
    [ "$(id -u)" = 0 ] || die "missing: ${wanted[*]}; install them, or run this as root"
    echo "installing: ${wanted[*]}"
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${wanted[@]}" >/dev/null
}

# A port that nothing listens on, below the ephemeral range, so that several clusters may run beside each other.
free_port() {
    local port
    while :; do
        port=$((6000 + RANDOM % 4000))
        (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null || { echo "$port"; return; }
    done
}

configure() {
    local host node ports=() port
    host=$(hostname -s)
    for _ in 0 1 2 3; do
        port=$(free_port)
        while [[ " ${ports[*]-} " == *" $port "* ]]; do port=$(free_port); done
        ports+=("$port")
    done
    cat >"$folder/slurm.conf" <<CONF
ClusterName=orpo
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=${ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# cred_expire: a requeued job waits that long before it may start again (default 120 s).
AuthInfo=socket=$folder/munge/munge.socket,cred_expire=10
CredType=cred/munge
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool.%n
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.%n.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/filetxt
JobCompLoc=$folder/jobs.txt
AccountingStorageType=accounting_storage/none
GresTypes=gpu
ReturnToService=2
JobRequeue=1
SlurmdTimeout=30
KillWait=20
MinJobAge=3600
SchedulerParameters=sched_interval=5,bf_interval=5
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
CONF
    for node in 0 1 2; do
        echo "NodeName=${NODES[node]} NodeHostname=$host NodeAddr=127.0.0.1 Port=${ports[node + 1]} CPUs=4 Gres=gpu:2" \
            "State=UNKNOWN" >>"$folder/slurm.conf"
    done
    cat >>"$folder/slurm.conf" <<CONF
PartitionName=low Nodes=n1,n2 Default=YES MaxTime=INFINITE PriorityTier=1 PreemptMode=REQUEUE GraceTime=120
PartitionName=high Nodes=n1,n2 MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF
PartitionName=spare Nodes=n1,n2,n3 MaxTime=INFINITE PriorityTier=1 PreemptMode=REQUEUE GraceTime=120
CONF
    for node in "${NODES[@]}"; do
        echo "NodeName=$node Name=gpu File=/dev/null,/dev/zero"
    done >"$folder/gres.conf"
}

up() {
    [ "$(id -u)" = 0 ] || die "needs root"
    local program
    for program in munged slurmctld slurmd srun; do
        command -v "$program" >/dev/null || die "$program is missing: $0 packages"
    done
    mkdir -p "$folder"/{munge,state}
    chmod 755 "$folder"
    chmod 700 "$folder/munge"
    grep -qF "$NAMES" /etc/hosts || echo "$NAMES" >>/etc/hosts
    configure
    dd if=/dev/urandom of="$folder/munge/key" bs=1 count=1024 status=none
    chmod 400 "$folder/munge/key"
    # The socket must be reachable; the key stays unreadable by its own mode.
    chmod 711 "$folder/munge"
    munged --force --socket="$folder/munge/munge.socket" --key-file="$folder/munge/key" --num-threads=2 \
        --pid-file="$folder/munge/munged.pid" --log-file="$folder/munge/munged.log" --seed-file="$folder/munge/seed"
    export SLURM_CONF=$folder/slurm.conf
    slurmctld -f "$SLURM_CONF" >"$folder/slurmctld.out" 2>&1
    local node
    for node in "${NODES[@]}"; do
        mkdir -p "$folder/spool.$node"
        slurmd -f "$SLURM_CONF" -N "$node" >"$folder/slurmd.$node.out" 2>&1
    done
    for _ in $(seq 120); do
        [ "$(sinfo -h -p spare -t idle -o %D 2>/dev/null)" = 3 ] && { echo "up: SLURM_CONF=$SLURM_CONF"; return; }
        sleep 0.5
    done
    sinfo >&2 || true
    tail -n 5 "$folder"/*.log >&2
    die "the nodes did not become idle in 60 s"
}

down() {
    export SLURM_CONF=$folder/slurm.conf
    local file pid
    [ -f "$SLURM_CONF" ] || { echo "nothing runs in $folder"; return; }
    timeout 20 scancel --full --user="$(id -un)" >/dev/null 2>&1 || true
    for _ in $(seq 60); do
        [ -z "$(timeout 5 squeue -h -t R,CG 2>/dev/null)" ] && break
        sleep 0.5
    done
    for file in "$folder"/slurmd.*.pid "$folder/slurmctld.pid" "$folder/munge/munged.pid"; do
        [ -f "$file" ] || continue
        pid=$(<"$file")
        kill "$pid" 2>/dev/null || true
        for _ in $(seq 100); do kill -0 "$pid" 2>/dev/null || break; sleep 0.1; done
        kill -9 "$pid" 2>/dev/null || true
    done
    # Not sed -i: in a container /etc/hosts is a mount and cannot be replaced.
    local hosts
    hosts=$(grep -vF "$NAMES" /etc/hosts)
    echo "$hosts" >/etc/hosts
    echo "down: $folder"
}

case "${1-} ${2-}" in
packages\ *) packages ;;
up\ /* | down\ /*) folder=$2; "$1" ;;
*) sed -n '2,8p' "$0" >&2; exit 2 ;;
esac
