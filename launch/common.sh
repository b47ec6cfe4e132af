# Shared by the launch scripts; sourced, not run.

checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
script=launch/$(basename "$0")

note() { echo "$script: $*" >&2; }

# die MESSAGE: bad use of a launch script.
die() {
    note "$*"
    exit 2
}

# fail MESSAGE: what was asked for did not work.
fail() {
    note "$*"
    exit 1
}

is_count() { [[ $1 =~ ^[1-9][0-9]{0,6}$ ]]; }

need_count() { is_count "$2" || die "$1 expects a whole number of at least 1, got '$2'"; }
need_value() { (($# > 1)) || die "$1 expects a value, got none"; }

# parse_launch_options ARGS...: sets ranks, hosts_file, threads, interface, controller, dry_run and command (an array).
# Scripts define usage, and controllers, the names among gloo and mpi they know as options.
parse_launch_options() {
    ranks='' hosts_file='' threads='' interface='' controller='' dry_run=false command=()
    while (($#)); do
        case $1 in
            -n | --ranks | --threads) need_value "$@" && need_count "$1" "$2" ;;&
            --hosts | --interface) need_value "$@" ;;&
            -n | --ranks) ranks=$2 && shift ;;
            --threads) threads=$2 && shift ;;
            --hosts) hosts_file=$2 && shift ;;
            --interface) interface=$2 && shift ;;
            --gloo | --mpi)
                [[ " $controllers " == *" ${1#--} "* ]] || die "unknown option $1; $script --help lists them"
                controller=${1#--}
                ;;
            --dry-run) dry_run=true ;;
            -h | --help) usage && exit 0 ;;
            --) shift && break ;;
            -*) die "unknown option $1; $script --help lists them" ;;
            *) break ;; # the command, without a -- before it
        esac
        shift
    done
    command=("$@")
    ((${#command[@]})) || die "expected a command to run after the options, got none: $script -n 4 -- python train.py"
}

# read_hosts: reads lines "host slots=N" of hosts_file into slots (their sum), host_list (host:N,host:N, only the slots
# that ranks need: horovodrun over Gloo fills all it is shown) and ranks_per_node (the most any node gets). Without a
# host file all ranks run on this node.
read_hosts() {
    host_list='' slots='' ranks_per_node=${ranks:-}
    [[ -n $hosts_file ]] || return 0
    [[ -r $hosts_file ]] || die "--hosts expects a file of lines 'host slots=N', cannot read '$hosts_file'"
    local host rest line=0 most=0 taken
    slots=0
    while read -r host rest || [[ -n $host ]]; do
        ((line += 1))
        [[ -z $host || $host == \#* ]] && continue
        [[ $rest =~ ^slots=([1-9][0-9]{0,6})([[:space:]]|$) ]] ||
            die "$hosts_file line $line: expected 'host slots=N', got '$host${rest:+ $rest}'"
        taken=${BASH_REMATCH[1]}
        if [[ -n $ranks ]] && ((taken > ranks - slots)); then
            taken=$((ranks - slots))
        fi
        ((taken <= 0)) || host_list+=${host_list:+,}$host:$taken
        ((slots += BASH_REMATCH[1], most = BASH_REMATCH[1] > most ? BASH_REMATCH[1] : most))
    done <"$hosts_file"
    ((slots)) || die "--hosts expects at least one line 'host slots=N', got none in '$hosts_file'"
    ranks=${ranks:-$slots}
    ((ranks <= slots)) || die "$ranks ranks asked for, but $hosts_file has $slots slots: raise slots= there or lower -n"
    ranks_per_node=$((ranks < most ? ranks : most))
}

# share_cores: sets threads per rank (--threads, else OMP_NUM_THREADS if set, else this node's cores shared out).
share_cores() {
    local cores
    cores=$(env -u OMP_NUM_THREADS -u OMP_THREAD_LIMIT nproc) # nproc heeds these; the node's cores are meant
    if [[ -z $threads ]] && is_count "${OMP_NUM_THREADS:-}"; then
        threads=$OMP_NUM_THREADS
    fi
    threads=${threads:-$((cores > ranks_per_node ? cores / ranks_per_node : 1))}
    ((ranks_per_node <= cores)) || note "$ranks_per_node ranks share $cores cores: this works, but slowly"
}

# prepare ARGS...: what every launcher does before it builds its command line.
prepare() {
    parse_launch_options "$@"
    read_hosts
    [[ -n $ranks ]] || die "expected -n N or --hosts FILE, got neither: how many ranks?"
    # shellcheck source=launch/env.sh
    source "$checkout/launch/env.sh" || exit 2
    share_cores
}

# run_or_show ARGS...: runs the command line in place of this shell, or prints it under --dry-run.
run_or_show() {
    if $dry_run; then
        local line
        printf -v line '%q ' "$@"
        echo "${line% }"
        exit 0
    fi
    exec "$@"
}
