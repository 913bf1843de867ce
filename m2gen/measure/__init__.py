"""What tuning and benchmarks share: context, isolated workers, clock, checks, rounds, statistics and the roofline."""
