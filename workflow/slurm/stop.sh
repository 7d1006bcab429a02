#!/usr/bin/env bash
# Ends the Slurm of start.sh, its jobs first, and removes its files.
set -euo pipefail
run=/run/slurm
grep -qs '^ClusterName=one_node_test$' $run/conf/slurm.conf || exit 0
wait_while() { for _ in {1..60}; do if ! "$@" > /dev/null 2>&1; then break; fi; sleep 0.5; done; }
alive() { grep -qs "$1" "/proc/$(cat $run/"$1".pid 2> /dev/null)/cmdline"; }
jobs() { timeout 10 squeue -h | grep .; }

timeout 10 scancel --user=root 2> /dev/null || true
wait_while jobs
for daemon in slurmd slurmctld; do
    if alive $daemon; then kill "$(cat $run/$daemon.pid)"; fi
    wait_while alive $daemon
done
[ ! -e $run/munged_is_ours ] || runuser -u munge -- munged --stop
rm -rf $run
