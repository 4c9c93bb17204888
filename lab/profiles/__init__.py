"""Step times of real GPUs, put together from public profiles: for benchmarks and simulation."""
