"""Searches of the tiles of kernels around a recurrence: their space, calls, float64 results and workers."""
