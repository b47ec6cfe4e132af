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

PATH, OPAL_PREFIX, LD_LIBRARY_PATH, PYTHONPATH and all variables HVD_SKETCH_*, GLOO_*, HOROVOD_*, MALLOC_*, NCCL_*,
NUMBA_*, TORCH_* and TRITON_* reach every rank.
EOF
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
        line+=(--hostfile "$hosts_file")
    else
        line+=(--oversubscribe)
    fi
    [[ -z $interface ]] || line+=(--mca pml ob1 --mca btl tcp,self --mca btl_tcp_if_include "$interface")
    open_mpi_settings
    line+=("${settings[@]}")
    for name in "${thread_variables[@]}"; do
        line+=(-x "$name=$threads")
    done
    for name in $(forwarded_names); do
        line+=(-x "$name")
    done
    run_or_show "${line[@]}" "${command[@]}"
}

main "$@"
