#!/usr/bin/env bash
# Trains one model twice, dense and sketched, and compares accuracy and bytes.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
    cat <<'EOF'
usage: launch/quickstart.sh [options] [arguments of benchmarks/quickstart.py]

Runs launch/setup.sh, then benchmarks/quickstart.py on several ranks of this machine.

  -n, --ranks N       number of ranks (default: 4)
  --launcher NAME     mpirun (default) or horovodrun, which also trains over Horovod
  --dry-run           print the command line and exit, without the set-up
  -h, --help          this text

Everything else goes to the Python script: 'launch/quickstart.sh -n 1 -- --help' lists it.
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
        horovodrun) transport=horovod ;;
        *) die "--launcher expects mpirun or horovodrun, got '$launcher'" ;;
    esac
    [[ -n $dry_run ]] || "$checkout/launch/setup.sh"
    exec "$checkout/launch/$launcher.sh" -n "$ranks" $dry_run -- \
        python "$checkout/benchmarks/quickstart.py" --transport "$transport" "${arguments[@]}"
}

main "$@"
