"""Time whole layers: m2gen's, the same with a peer's operator, attention, and layers of other packages.

``entries`` has the types, without torch. ``subject`` is what an adapter returns, and ``makers`` has those of m2gen and
torch; ``check`` holds each against float64, ``clock`` times it, ``breakdown`` says what the kernels of a step are for.
``worker`` is the process on the GPU, ``side_by_side`` asks it in rounds, and ``document`` has the results as JSON.
"""
