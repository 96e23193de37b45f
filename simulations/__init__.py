"""Studies and benchmarks; each module is one command."""
