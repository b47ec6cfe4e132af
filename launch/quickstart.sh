#!/usr/bin/env bash
# Trains one model twice, dense and compressed, and compares accuracy and bytes.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
    cat <<'EOF'
usage: launch/quickstart.sh [options] [arguments of benchmarks.quickstart]

Runs launch/setup.sh, then 'python -m benchmarks.quickstart' on several ranks of this machine, from any directory.

  -n, --ranks N       number of ranks (default: 4)
  --launcher NAME     mpirun (default), torchrun or horovodrun; trains over MPI, torch.distributed or Horovod
  --dry-run           print the command line and exit, without the set-up
  -h, --help          this text

Everything else goes to the Python module: 'launch/quickstart.sh -n 1 -- --help' lists it.
EOF
}

main() {
    local ranks=4 launcher=mpirun dry_run='' transport arguments=()
    while (($#)); do
        case $1 in
            -n | --ranks) need_value "$@" && need_count "$1" "$2" && ranks=$2 && shift ;;
            --launcher) need_value "$@" && launcher=$2 && shift ;;
            --dry-run) dry_run=--dry-run ;;
            -h | --help) usage && exit 0 ;;
            --) shift && arguments+=("$@") && break ;;
            *) arguments+=("$1") ;;
        esac
        shift
    done
    case $launcher in
        mpirun) transport=mpi ;;
        torchrun) transport=torch ;;
        horovodrun) transport=horovod ;;
        *) die "--launcher expects mpirun, torchrun or horovodrun, got '$launcher'" ;;
    esac
    [[ -n $dry_run ]] || "$checkout/launch/setup.sh"
    # -P: a folder "benchmarks" where the user stands is not ours.
    export PYTHONPATH=$checkout${PYTHONPATH:+:$PYTHONPATH}
    exec "$checkout/launch/$launcher.sh" -n "$ranks" $dry_run -- \
        python -P -m benchmarks.quickstart --transport "$transport" "${arguments[@]}"
}

main "$@"
