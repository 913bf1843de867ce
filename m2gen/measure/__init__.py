"""What tuning and benchmarks share: the clock, isolated workers, the lock, the environment, the roofline."""
