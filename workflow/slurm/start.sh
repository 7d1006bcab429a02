#!/usr/bin/env bash
# A Slurm of one node, this machine, for tests: munged, slurmctld and slurmd, without accounting. Run as root.
# Its files lie in /run/slurm, where Slurm's commands find conf/slurm.conf by themselves: SLURM_CONF would not do,
# because Snakemake's plugin takes it from the job steps. A second call changes nothing; stop.sh ends it.
set -euo pipefail
run=/run/slurm conf=/run/slurm/conf/slurm.conf name=one_node_test
fail() { echo "$*" >&2; exit 1; }
alive() { grep -qs "$1" "/proc/$(cat $run/"$1".pid 2> /dev/null)/cmdline"; }
up() { alive slurmctld && alive slurmd && sinfo -h -t idle,mixed,allocated -o %n 2> /dev/null | grep -q .; }

[ "$(id -u)" = 0 ] || fail "Slurm's daemons need root: run this script as root."
for program in munged slurmctld slurmd; do
    command -v $program > /dev/null || fail "$program is missing: run apt-get install slurm-wlm munge."
done
for other in "${SLURM_CONF:-}" /etc/slurm/slurm.conf $conf; do
    [ ! -e "$other" ] || grep -q "^ClusterName=$name$" "$other" || fail "This machine has a Slurm: $other; use that one."
done
if [ -e $conf ]; then
    if up; then echo "Slurm is running already." && exit; fi
    "$(dirname "$0")/stop.sh" # what an earlier one left
fi

mkdir -p $run/conf $run/state $run/spool
if ! munge -n > /dev/null 2>&1; then
    install -d -o munge -g munge /run/munge
    runuser -u munge -- munged
    touch $run/munged_is_ours
fi
cat > $conf << END
ClusterName=$name
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmUser=root
StateSaveLocation=$run/state
SlurmdSpoolDir=$run/spool
SlurmctldPidFile=$run/slurmctld.pid
SlurmdPidFile=$run/slurmd.pid
SlurmctldLogFile=$run/slurmctld.log
SlurmdLogFile=$run/slurmd.log
# no cgroups: a container will do
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
# jobs share the node, by cores and memory
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
# squeue remembers a job for an hour [s]; nothing else does
MinJobAge=3600
$(slurmd -C | grep ^NodeName) NodeAddr=127.0.0.1
PartitionName=test Nodes=ALL Default=YES
END
slurmctld -f $conf
slurmd -f $conf
for _ in {1..60}; do
    if up; then sinfo && exit; fi
    sleep 0.5
done
fail "Slurm did not come up in 30 s: see $run/slurmctld.log and $run/slurmd.log."
