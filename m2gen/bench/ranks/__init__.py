"""Check and time a layer over several ranks of this host: GPUs over NCCL, or CPUs over gloo at tiny sizes.

``entries`` has the values: a job, its cases and their rows. ``launch`` starts the ranks and ends them together;
``worker`` is one of them. ``forms`` puts the layer over ranks, ``check`` holds it against float64 before ``timing``
times it, and ``model`` predicts the times.
"""
