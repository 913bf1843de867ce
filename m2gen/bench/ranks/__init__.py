"""Check and time a layer over several ranks of this host: GPUs over NCCL, or CPUs over gloo at tiny sizes.

``entries`` has the values: a job, its cases and their rows. ``launch`` starts the ranks and ends them together;
``worker`` is one of them, and ``pulse`` its sign of life. ``forms`` puts the layer, or a ``hybrid`` of it, over ranks,
``check`` holds that against float64 before ``timing`` times it, ``model`` predicts the times of a run from its own link
and recurrences, and ``forecast`` from what one GPU was measured to do.
"""
