#!/usr/bin/env bash
# Runs the tests in the environment launch/setup.sh makes. Exit status: pytest's; 5 if no test was found.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
    cat <<'EOF'
usage: launch/test.sh [pytest arguments]

Runs launch/setup.sh, then pytest on tests/. Examples: launch/test.sh -x -k hash; launch/test.sh -m "not multiprocess"

  HVD_SKETCH_TEST_LIMIT_S   seconds after which the whole run is ended as failed (default: 4800)
EOF
}

main() {
    case ${1:-} in
        -h | --help) usage && exit 0 ;;
    esac
    local limit=${HVD_SKETCH_TEST_LIMIT_S:-4800} foreground=''
    need_count HVD_SKETCH_TEST_LIMIT_S "$limit"
    "$checkout/launch/setup.sh"
    # shellcheck source=launch/env.sh
    source "$checkout/launch/env.sh"
    cd "$checkout"
    [[ ! -t 0 ]] || foreground=--foreground # so that Ctrl-C reaches pytest
    echo "test: at most $limit s, then interrupted as failed (HVD_SKETCH_TEST_LIMIT_S)"
    # SIGINT, so that pytest still says which test was under way, and what had failed before.
    exec timeout $foreground --signal=INT --kill-after=60 "$limit" python -m pytest "$@"
}

main "$@"
