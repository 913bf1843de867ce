"""What may be chosen about how a kernel runs: the knobs, the default, and the one predicate of what is valid."""

from m2gen.schedule.knobs import (
    HOPPER,
    SHORTEST_SEGMENT,
    WARPGROUP_OPERANDS,
    WARPGROUP_ROWS,
    BackwardSchedule,
    ForwardSchedule,
    Layouts,
    Part,
    Reduction,
    Schedule,
    Scratch,
    Tanh,
    check,
    most_warps,
    parse,
    problems,
)

__all__ = [
    "HOPPER",
    "SHORTEST_SEGMENT",
    "WARPGROUP_OPERANDS",
    "WARPGROUP_ROWS",
    "BackwardSchedule",
    "ForwardSchedule",
    "Layouts",
    "Part",
    "Reduction",
    "Schedule",
    "Scratch",
    "Tanh",
    "check",
    "most_warps",
    "parse",
    "problems",
]
