"""What the benchmarks over an emulated network share: the competitors, their checks, the network and the records."""
