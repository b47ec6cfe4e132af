#!/usr/bin/env bash
# Builds the documentation site in the environment launch/setup.sh makes. A broken link is an error.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
    cat <<'EOF'
usage: launch/docs.sh [DIRECTORY]

Builds the documentation into DIRECTORY (default: site in the checkout). Its index.html opens from disk; the search needs a
web server: python -m http.server --directory site. Pages that follow your changes: source launch/env.sh && mkdocs serve
EOF
}

main() {
    case ${1:-} in
        -h | --help) usage && exit 0 ;;
        -*) die "unknown option $1; $script --help" ;;
    esac
    local target=${1:-$checkout/site}
    mkdir -p "$target"
    target=$(cd "$target" && pwd -P)
    "$checkout/launch/setup.sh"
    # shellcheck source=launch/env.sh
    source "$checkout/launch/env.sh"
    cd "$checkout"
    NO_MKDOCS_2_WARNING=1 mkdocs build --quiet --strict --site-dir "$target"
    echo "docs: $target/index.html"
}

main "$@"
