#!/usr/bin/env bash
# Everything a GPU must show, in one command; without a network and without root.
set -uo pipefail

usage() {
    cat <<'EOF'
usage: benchmarks/gpu/run_all.sh OUT [--minutes N] [--parts "NAME ..."] [--data-dir DIR] [--rehearse]

Runs, in this order: tests, kernels, coding, ranks, steps, training, language. Each has a time limit of its own and
leaves its figures in OUT as it goes: record.json, kernels.json, two traces, log.txt, and summary.md at the end.

  --minutes N      all shall fit into so many; 25 is everything (default: 9). What comes last is shortened, then left out
  --parts "..."    only these; OUT keeps what other calls have left there
  --data-dir DIR   has cifar10/ and text/; without it nothing is trained
  --rehearse       everything in small, on a CPU under Triton's interpreter where there is no GPU
  PYTHON           the interpreter (default: python3)
EOF
}

all_parts="tests kernels coding ranks steps training language"

parse() {
    out='' minutes=9 parts=$all_parts data_dir='' rehearse=false
    while (($#)); do
        case $1 in
            --minutes | --parts | --data-dir)
                (($# > 1)) || die "$1 expects a value"
                case $1 in
                    --minutes) minutes=$2 ;;
                    --parts) parts=$2 ;;
                    --data-dir) data_dir=$2 ;;
                esac
                shift
                ;;
            --rehearse) rehearse=true ;;
            -h | --help) usage && exit 0 ;;
            -*) die "unknown option $1; --help lists them" ;;
            *) [[ -z $out ]] || die "expected one folder, got $out and $1" && out=$1 ;;
        esac
        shift
    done
    [[ -n $out ]] || die "expected a folder for the results; --help says more"
    [[ $minutes =~ ^[1-9][0-9]*$ ]] || die "--minutes expects a whole number of at least 1, got '$minutes'"
    local name
    for name in $parts; do
        [[ " $all_parts " == *" $name "* ]] || die "unknown part $name; there are: $all_parts"
    done
}

die() {
    echo "benchmarks/gpu/run_all.sh: $*" >&2
    exit 2
}

# part NAME SECONDS COMMAND...: run it if it is asked for and there is time, for at most its share of the minutes.
part() {
    local name=$1 limit=$(($2 * minutes / 9)) status started=$SECONDS
    shift 2
    [[ " $parts " == *" $name "* ]] || return 0
    ((limit <= ends - SECONDS)) || limit=$((ends - SECONDS))
    if ((limit < 10)); then
        echo "== $name: no time left"
        return 0
    fi
    echo "== $name, at most $limit s: $*"
    BUDGET_S=$limit timeout --signal=INT --kill-after=5 "$limit" "$@" 2>&1 | at_most_a_megabyte
    status=${PIPESTATUS[0]}
    echo "== $name: status $status after $((SECONDS - started)) s"
    "$python" -m benchmarks.gpu.record "$out" "$name" "$status" "$((SECONDS - started))"
    ((status == 0)) || failed+=" $name"
}

# A failing kernel can print a line for each of its threads: the beginning and the end tell what happened.
at_most_a_megabyte() {
    head -c 500000
    tail -c 500000
}

run_parts() {
    local small=() dims="1e6 25e6 100e6 1e9" rows="3" rounds=7 examples=() processes=()
    ! "$python" -c 'import xdist' 2>/dev/null || processes=(-n 8) # most of the time goes into compilation
    if $rehearse; then
        small=(--rehearse) dims="20000" rounds=1
        examples=(-k "feedback or nothing_to_do or subtraction")
    elif ((minutes >= 25)); then
        rows="3 5"
    fi
    # shellcheck disable=SC2086
    {
        part tests 90 "$python" -m pytest -m gpu -q -p no:cacheprovider tests/gpu "${processes[@]}" \
            "${examples[@]}"
        part kernels 110 "$python" -m benchmarks.kernels --device "$device" --dims $dims --rows $rows \
            --rounds $rounds --no-torch --json "$out/kernels.json"
        part coding 40 "$python" -m benchmarks.gpu.coding "$out" "${small[@]}"
        part ranks 70 "$python" -m benchmarks.gpu.ranks "$out" "${small[@]}"
        part steps 50 "$python" -m benchmarks.gpu.steps "$out" "${small[@]}"
        if [[ -n $data_dir ]]; then
            part training 180 "$python" -m benchmarks.gpu.training "$out" "$data_dir" training "${small[@]}"
            part language 90 "$python" -m benchmarks.gpu.training "$out" "$data_dir" language "${small[@]}"
        fi
    }
}

main() {
    parse "$@"
    mkdir -p "$out" || exit 2
    out=$(cd "$out" && pwd -P)
    [[ -z $data_dir ]] || data_dir=$(cd "$data_dir" && pwd -P) || exit 2
    exec > >(tee -a "$out/log.txt") 2>&1
    cd "$(dirname "${BASH_SOURCE[0]}")/../.." || exit 2
    python=${PYTHON:-python3} failed='' device=cuda
    export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
    "$python" -m benchmarks.gpu.record "$out" $($rehearse && echo rehearse) || exit 2
    "$python" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' || device=cpu
    [[ $device == cuda ]] || export TRITON_INTERPRET=1
    ends=$((SECONDS + 60 * minutes - 10)) # the summary takes some seconds
    run_parts
    "$python" -m benchmarks.gpu.summary "$out"
    [[ -z $failed ]] || { echo "failed:$failed" && exit 1; }
}

main "$@"
