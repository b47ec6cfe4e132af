#!/usr/bin/env bash
# Runs a command on several ranks under horovodrun.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
controllers='gloo mpi'

usage() {
    cat <<'EOF'
usage: launch/horovodrun.sh -n N [options] [--] python script.py [arguments]

Starts N ranks under horovodrun. One rank that fails (an exception, sys.exit with a status, a signal) ends the job.

  -n, --ranks N      number of ranks; with --hosts the default is all slots
  --gloo | --mpi     what Horovod talks over (default: --gloo)
  --hosts FILE       host file, lines 'host slots=N'; hosts need this checkout and environment at the same paths
  --threads N        threads of each rank (default: OMP_NUM_THREADS if set, else its share of the node's cores)
  --interface NAME   network interface to use
  --dry-run          print the command line and exit
  -h, --help         this text

horovodrun carries the whole environment to every rank.
EOF
}

main() {
    prepare "$@"
    controller=${controller:-gloo}
    local line=(env "${thread_variables[@]/%/=$threads}") quoted
    line+=(horovodrun -np "$ranks" -H "${host_list:-localhost:$ranks}" "--$controller")
    [[ -z $interface ]] || line+=(--network-interfaces "$interface")
    if [[ $controller == mpi ]]; then
        open_mpi_settings
        printf -v quoted '%q ' "${settings[@]}" # horovodrun hands them to a shell
        ((${#settings[@]} == 0)) || line+=("--mpi-args=${quoted% }")
    fi
    run_or_show "${line[@]}" "${command[@]}"
}

main "$@"
