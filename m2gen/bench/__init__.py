"""How long implementations of the recurrence take beside each other, and how far they are from the GPU's limits.

``contest`` has the types: a workload, the contenders on it, a timer that is a GPU or a script. ``measure`` holds each
contender against the oracle before it times any, in turns; ``worker`` is the GPU. ``sweep`` has sizes along an axis,
``book`` results as a document, ``against`` their comparison with earlier ones, ``peers`` other implementations.
"""
