"""How long implementations of the recurrence take beside each other, and how far they are from the GPU's limits.

``entries`` has the types: a workload, the implementations on it, a timer that is a GPU or a script. ``side_by_side``
holds each implementation against the oracle before it times any, in rounds; ``worker`` is the GPU. ``sweep`` has sizes
along an axis, ``document`` results as JSON, ``against`` their comparison with earlier ones, ``peers`` adapters.
"""
