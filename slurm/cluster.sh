#!/usr/bin/env bash
# A SLURM cluster of two virtual nodes with two GPUs each (as far as SLURM knows) on this machine, to try studies on.
#
#   apt-get install --no-install-recommends slurmctld slurmd slurm-client munge
#   slurm/cluster.sh start FOLDER [PORT]     # starts it; FOLDER is new, PORT the first of three free ones
#   export SLURM_CONF=FOLDER/slurm.conf      # from here on sinfo, sbatch and histonb talk to it
#   slurm/cluster.sh stop FOLDER
#
# Partitions: `gpu`, and `urgent`, whose jobs preempt those of `gpu`. All of it listens on the loopback alone, and no
# root is needed. Debian's slurmd can be several nodes of one machine; other builds may not.
set -euo pipefail

usage() { sed -n '4,7s/^# *//p' "$0" >&2; exit 2; }
[ $# -ge 2 ] || usage
folder=$(realpath -m "$2")
port=${3:-26817}

configure() {
    [ ! -e "$folder" ] || { echo "$folder exists already: give a new folder, job numbers start again at 1" >&2; exit 1; }
    mkdir -p "$folder"/{state,spool,munge}
    chmod 700 "$folder/munge"
    (umask 077; head -c 128 /dev/urandom > "$folder/munge/key")
    for gpu in 0 1; do ln -s /dev/null "$folder/gpu$gpu"; done # a device that is there to be allocated
    echo "Name=gpu File=$folder/gpu[0-1]" > "$folder/gres.conf"
    cat > "$folder/slurm.conf" <<CONF
ClusterName=loopback
FirstJobId=$((port % 5000 + 1))
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort=$port
SlurmUser=$(id -un)
SlurmdUser=$(id -un)
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket=$folder/munge/socket,cred_expire=5
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool/%n
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd-%n.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd-%n.log
MpiDefault=none
SwitchType=switch/none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/filetxt
JobCompLoc=$folder/finished.txt
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
ReturnToService=2
MinJobAge=3600
KillWait=5
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
GresTypes=gpu
NodeName=127.0.0.11 NodeHostname=localhost NodeAddr=127.0.0.1 Port=$((port + 1)) CPUs=4 RealMemory=4000 Gres=gpu:2
NodeName=127.0.0.12 NodeHostname=localhost NodeAddr=127.0.0.1 Port=$((port + 2)) CPUs=4 RealMemory=4000 Gres=gpu:2
PartitionName=gpu Nodes=ALL Default=YES MaxTime=60 PriorityTier=1 GraceTime=120
PartitionName=urgent Nodes=ALL MaxTime=60 PriorityTier=2 PreemptMode=OFF
CONF
}

launch() { # NAME COMMAND...: a daemon whose process number and output are kept in the folder
    name=$1; shift
    nohup setsid "$@" < /dev/null >> "$folder/$name.out" 2>&1 &
    echo $! > "$folder/$name.started"
}

stop() {
    for number in "$folder"/*.started; do
        [ -e "$number" ] || continue
        pid=$(cat "$number")
        if tr '\0' ' ' 2> /dev/null < "/proc/$pid/cmdline" | grep -qF "$folder"; then kill "$pid" 2> /dev/null || true; fi
        for _ in $(seq 50); do kill -0 "$pid" 2> /dev/null || break; sleep 0.1; done
        if tr '\0' ' ' 2> /dev/null < "/proc/$pid/cmdline" | grep -qF "$folder"; then kill -KILL "$pid" 2> /dev/null || true; fi
        rm "$number"
    done
}

start() {
    configure
    export PATH=$PATH:/usr/sbin:/sbin SLURM_CONF=$folder/slurm.conf
    munge=$folder/munge
    launch munged munged --foreground --force --key-file="$munge/key" --socket="$munge/socket" --pid-file="$munge/pid" \
        --seed-file="$munge/seed" --log-file="$munge/log" --num-threads=2
    for _ in $(seq 100); do [ -S "$munge/socket" ] && break; sleep 0.1; done
    launch slurmctld slurmctld -D -f "$SLURM_CONF"
    for node in 127.0.0.11 127.0.0.12; do launch "slurmd-$node" slurmd -D -N "$node" -f "$SLURM_CONF"; done
    for _ in $(seq 300); do
        [ "$(timeout 5 sinfo --noheader --partition=gpu --Node --format=%t 2> /dev/null | grep -c '^idle$')" = 2 ] &&
            { echo "export SLURM_CONF=$SLURM_CONF"; return; }
        sleep 0.1
    done
    stop
    echo "the cluster did not come up in 30 s: see $folder/*.out and $folder/*.log" >&2
    exit 1
}

case $1 in start) start ;; stop) stop ;; *) usage ;; esac
