"""All that a GPU must show, in one command: ``benchmarks/gpu/run_all.sh OUT``."""
