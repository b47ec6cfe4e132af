#!/usr/bin/env bash
# Runs a command on several ranks under torchrun.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
controllers=''

usage() {
    cat <<'EOF'
usage: launch/torchrun.sh -n N [options] [--] python script.py [arguments]

Starts N ranks under torchrun, on other hosts through ssh. One rank that fails (an exception, sys.exit with a status, a
signal) ends the job.

  -n, --ranks N      number of ranks; with --hosts the default is all slots
  --hosts FILE       host file, lines 'host slots=N'; hosts need this checkout and environment at the same paths
  --threads N        threads of each rank (default: OMP_NUM_THREADS if set, else its share of the node's cores)
  --interface NAME   network interface that Gloo and NCCL use
  --dry-run          print the command line and exit; with --hosts one for each host
  -h, --help         this text

torchrun carries the whole environment to the ranks of its host. The hosts of --hosts get PATH, OPAL_PREFIX,
LD_LIBRARY_PATH, PYTHONPATH and all variables HVD_SKETCH_*, GLOO_*, HOROVOD_*, MALLOC_*, NCCL_*, NUMBA_*, TORCH_* and
TRITON_*. MASTER_PORT, by default 29500, must be free on the first of them.
EOF
}

main() {
    prepare "$@"
    local name node place=0 variables=("${thread_variables[@]/%/=$threads}") forwarded=() nodes lines=()
    [[ -z $interface ]] || variables+=("GLOO_SOCKET_IFNAME=$interface" "NCCL_SOCKET_IFNAME=$interface")
    if [[ -z $hosts_file ]]; then
        run_or_show env "${variables[@]}" torchrun --standalone --nproc-per-node "$ranks" --no-python "${command[@]}"
    fi
    for name in $(forwarded_names); do
        forwarded+=("$name=${!name}")
    done
    IFS=, read -ra nodes <<<"$host_list"
    for node in "${nodes[@]}"; do
        printf -v name '%q ' env "${forwarded[@]}" "${variables[@]}" torchrun --nnodes "${#nodes[@]}" \
            --node-rank "$place" --nproc-per-node "${node##*:}" --master-addr "${nodes[0]%:*}" \
            --master-port "${MASTER_PORT:-29500}" --no-python "${command[@]}"
        lines+=("${node%:*}" "${name% }")
        ((place += 1))
    done
    if $dry_run; then
        printf '%s: %s\n' "${lines[@]}"
        exit 0
    fi
    exec python "$checkout/launch/on_hosts.py" "${lines[@]}"
}

main "$@"
