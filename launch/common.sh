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
    [[ -r $hosts_file && ! -d $hosts_file ]] ||
        die "--hosts expects a file of lines 'host slots=N', cannot read '$hosts_file'"
    local host rest line=0 most=0 taken seen=' '
    slots=0
    while read -r host rest || [[ -n $host ]]; do
        ((line += 1))
        [[ $host$rest != *$'\r' ]] || die "$hosts_file line $line ends as in Windows: mend it by sed -i 's/\\r\$//' FILE"
        [[ -z $host || $host == \#* ]] && continue
        [[ $host != *:* ]] || die "$hosts_file line $line: expected a name or an IPv4 address, got '$host'"
        [[ $seen != *" $host "* ]] || die "$hosts_file line $line: '$host' stands there twice: add its slots up"
        seen+="$host "
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

# Thread pools every rank has: OpenMP's (torch's on CPUs), Numba's, MKL's.
thread_variables=(OMP_NUM_THREADS NUMBA_NUM_THREADS MKL_NUM_THREADS)

# share_cores: sets threads per rank (--threads, else OMP_NUM_THREADS if set, else this node's cores shared out), and
# crowded where ranks outnumber the cores.
share_cores() {
    local cores
    cores=$(env -u OMP_NUM_THREADS -u OMP_THREAD_LIMIT nproc) # nproc heeds these; the node's cores are meant
    if [[ -z $threads ]] && is_count "${OMP_NUM_THREADS:-}"; then
        threads=$OMP_NUM_THREADS
    fi
    threads=${threads:-$((cores > ranks_per_node ? cores / ranks_per_node : 1))}
    crowded=false
    if ((ranks_per_node > cores)); then
        crowded=true
        note "$ranks_per_node ranks share $cores cores: this works, but slowly"
    fi
}

# forwarded_names: variables that ranks on all hosts shall see; mpirun itself carries OMPI_* on.
forwarded_names() {
    local name
    for name in PATH OPAL_PREFIX LD_LIBRARY_PATH PYTHONPATH; do
        [[ -z ${!name:-} ]] || echo "$name"
    done
    compgen -e | grep -E '^(HVD_SKETCH|GLOO|HOROVOD|MALLOC|NCCL|NUMBA|TORCH|TRITON)_' |
        grep -Fvx "$(printf '%s\n' "${thread_variables[@]}")" | LC_ALL=C sort
}

# keep_freed_memory: exports what glibc does with memory that a rank frees, unless that is set already. By default large
# tensors go back to the system, which must then clear their pages again in every step. Of a step of 1.3 M parameters,
# backward and SGD among it, that took 2.0 of 12.9 ms on one rank, and 2 to 5 of 27 to 38 with 4 ranks on 2 cores. A
# rank keeps up to 256 MB that it has freed.
keep_freed_memory() {
    export MALLOC_MMAP_THRESHOLD_=${MALLOC_MMAP_THRESHOLD_:-33554432} # the largest that glibc takes
    export MALLOC_TRIM_THRESHOLD_=${MALLOC_TRIM_THRESHOLD_:-268435456}
}

# open_mpi_settings: sets settings, an array of what Open MPI's mpirun is told, however it is started. What horovodrun
# --mpi says by itself is left out: of a parameter that is given twice Open MPI takes both values, joined by a comma.
open_mpi_settings() {
    settings=()
    # Remote hosts start Open MPI's daemon from where it lies there: at the same path.
    [[ -z $hosts_file || -z ${OPAL_PREFIX:-} ]] || settings+=(--prefix "$OPAL_PREFIX")
    # A rank that waits hands its core to one that computes. Open MPI does so by itself where ranks outnumber a host's
    # slots, and we name as many slots as ranks. An exchange of 1 M coordinates, 4 ranks on 2 cores: 14 to 16 ms instead
    # of 53 to 69 with --hosts, over Horovod 20 to 66 instead of 601 to 806.
    ! $crowded || settings+=(--mca mpi_yield_when_idle 1)
    [[ -n $interface ]] || return 0
    settings+=(--mca oob_tcp_if_include "$interface")
    # By default Open MPI asks for every piece of a long message, and the question waits in line behind what goes
    # the other way: 4 hosts at 100 Mbit/s took twice as long for an allgather as its bytes do. Pushed, and with
    # short lines, 1.08 times (three to one: 1.2 instead of 1.7 times, and nothing is lost in the switch's queue).
    settings+=(--mca btl_tcp_flags send,inplace --mca btl_tcp_sndbuf 131072)
    # Nor does a message of up to 2 MiB wait for the other end to ask for it: of 1.5 MB, 12 ms at 1 Gbit/s, an
    # alltoall between 4 hosts took 16 ms and an allgather 19, now 13 and 14. For 18 MB of buffers.
    settings+=(--mca btl_tcp_eager_limit 2097152 --mca btl_tcp_rndv_eager_limit 2097152)
}

# prepare ARGS...: what every launcher does before it builds its command line.
prepare() {
    parse_launch_options "$@"
    read_hosts
    [[ -n $ranks ]] || die "expected -n N or --hosts FILE, got neither: how many ranks?"
    # shellcheck source=launch/env.sh
    source "$checkout/launch/env.sh" || exit 2
    share_cores
    keep_freed_memory
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
