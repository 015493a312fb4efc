"""Real inputs, definitions in float64, verification and timing; used by the commands, the benchmarks and the tests."""
