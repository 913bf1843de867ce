"""Time implementations of the recurrence side by side, and compare them with the GPU's limits.

``entries`` has the types: workloads, implementations, and a timer that is a GPU or a script. ``side_by_side`` checks
every implementation against the oracle, then times them in rounds; ``worker`` is the process on the GPU. ``sweep`` has
the sizes along an axis, ``document`` the results as JSON, ``against`` the comparison with earlier ones, and ``peers``
the adapters of other implementations.
"""
