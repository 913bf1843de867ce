"""Shared by tuning and benchmarks: context, isolated workers, clock, checks, rounds, statistics and the roofline."""
