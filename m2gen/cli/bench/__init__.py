"""The command ``m2gen bench``: ``command`` takes its options, and chooses what they ask for.

``operators`` times a spec's workloads and sweeps, ``layers`` whole layers, and ``ranks`` layers over several GPUs;
``earlier`` shows what any of them wrote. Options that belong to neither layers nor ranks are in ``options``.
"""
