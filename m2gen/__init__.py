"""m2gen: YAML specs to tuned, verified Triton kernels for the M²RNN recurrence (arXiv 2603.14360)."""

__version__ = "0.2.0"
