"""How a kernel is made of a variant and a schedule: its text, its arguments, and what a compiler makes of it.

``render``, and what it asks, is pure; ``compile`` and ``resources`` import triton, so the folder imports nothing.
"""
