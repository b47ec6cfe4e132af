#!/usr/bin/env bash
# Runs a command on several ranks under Open MPI's mpirun.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
controllers=''

usage() {
    cat <<'EOF'
usage: launch/mpirun.sh -n N [options] [--] python script.py [arguments]

Starts N ranks under mpirun. One rank that fails (an exception, sys.exit with a status, a signal) ends the job.

  -n, --ranks N      number of ranks; with --hosts the default is all slots
  --hosts FILE       host file, lines 'host slots=N'; hosts need this checkout and environment at the same paths
  --threads N        threads of each rank (default: OMP_NUM_THREADS if set, else its share of the node's cores)
  --interface NAME   send everything over TCP on this network interface, shared memory and fast fabrics left out
  --dry-run          print the command line and exit
  -h, --help         this text

PATH, OPAL_PREFIX, LD_LIBRARY_PATH, PYTHONPATH and all variables HVD_SKETCH_*, HOROVOD_* and NCCL_* reach every rank.
EOF
}

# forwarded_names: variables all ranks shall see; mpirun itself carries OMPI_* on.
forwarded_names() {
    local name
    for name in PATH OPAL_PREFIX LD_LIBRARY_PATH PYTHONPATH; do
        [[ -z ${!name:-} ]] || echo "$name"
    done
    compgen -e | grep -E '^(HVD_SKETCH|HOROVOD|NCCL)_' | LC_ALL=C sort
}

# guard_python COMMAND...: sets command so that Python scripts run under mpi4py's runner, which aborts the job on an
# uncaught exception or a failing sys.exit. Plain Python would wait in MPI_Finalize for ranks that wait for it.
guard_python() {
    command=("$@")
    [[ ${1##*/} =~ ^python[0-9.]*$ ]] || return 0
    local i=1
    while ((i < $#)); do
        case ${command[i]} in
            -W | -X) ((i += 2)) ;;
            -W?* | -X?*) ((i += 1)) ;;
            -m | -c | - | [!-]*) break ;;
            -*[!-bBdEIOPqRsuvx]*) return 0 ;; # an option the runner cannot follow, such as -S or --version
            *) ((i += 1)) ;;
        esac
    done
    [[ $i -lt $# && "${command[*]:i:2}" != "-m mpi4py" ]] || return 0
    command=("${command[@]:0:i}" -m mpi4py "${command[@]:i}")
}

main() {
    prepare "$@"
    guard_python "${command[@]}"
    local line=(mpirun -n "$ranks" --map-by slot --bind-to none) name
    if [[ -n $hosts_file ]]; then
        line+=(--hostfile "$hosts_file" ${OPAL_PREFIX:+--prefix "$OPAL_PREFIX"})
    else
        line+=(--oversubscribe)
    fi
    if [[ -n $interface ]]; then
        line+=(--mca pml ob1 --mca btl tcp,self --mca btl_tcp_if_include "$interface")
        line+=(--mca oob_tcp_if_include "$interface")
        # By default Open MPI asks for every piece of a long message, and the question waits in line behind what goes
        # the other way: 4 hosts at 100 Mbit/s took twice as long for an allgather as its bytes do. Pushed, and with
        # short lines, 1.08 times (three to one: 1.2 instead of 1.7 times, and nothing is lost in the switch's queue).
        line+=(--mca btl_tcp_flags send,inplace --mca btl_tcp_sndbuf 131072)
        # Nor does a message of up to 2 MiB wait for the other end to ask for it: of 1.5 MB, 12 ms at 1 Gbit/s, an
        # alltoall between 4 hosts took 16 ms and an allgather 19, now 13 and 14. For 18 MB of buffers.
        line+=(--mca btl_tcp_eager_limit 2097152 --mca btl_tcp_rndv_eager_limit 2097152)
    fi
    for name in OMP_NUM_THREADS NUMBA_NUM_THREADS MKL_NUM_THREADS; do
        line+=(-x "$name=$threads")
    done
    for name in $(forwarded_names); do
        line+=(-x "$name")
    done
    run_or_show "${line[@]}" "${command[@]}"
}

main "$@"
