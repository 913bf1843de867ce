"""What tests of one file could leave to those of other files in the same process, and who left what."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import zip_longest
from typing import Any

import torch

OWN_BUSINESS = (
    "PYTEST_CURRENT_TEST", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "TOKENIZERS_PARALLELISM", "TRITON_PTXAS_PATH",
)  # fmt: skip
"""Variables that pytest changes from test to test, and those that m2gen and libraries set once where a user has not."""
MAPPINGS = (
    ("transformers.models.auto.configuration_auto", "CONFIG_MAPPING"),
    ("transformers.models.auto.modeling_auto", "MODEL_MAPPING"),
    ("transformers.models.auto.modeling_auto", "MODEL_FOR_CAUSAL_LM_MAPPING"),
)
"""What Auto classes ask, by module; the first is imported no later than the others."""


def registries() -> list[dict[Any, Any]]:
    """Return what transformers' Auto classes make of ``model_type`` and of configurations, where it is imported."""
    found = []
    for module, name in MAPPINGS:
        if module in sys.modules:
            found.append(getattr(sys.modules[module], name)._extra_content)
    return found


@contextmanager
def kept_registries() -> Iterator[None]:
    """Have Auto classes make, in the end, what they made before."""
    before = [dict(registry) for registry in registries()]
    try:
        yield
    finally:
        for registry, known in zip_longest(registries(), before, fillvalue={}):  # empty where transformers was not
            registry.clear()
            registry.update(known)


def state() -> dict[str, Any]:
    """Return whatever of this process tests rely on and could change, by a name that a message may have."""
    found: dict[str, Any] = {f"os.environ[{n!r}]": value for n, value in os.environ.items() if n not in OWN_BUSINESS}
    found |= _of_torch() | _of_modules()
    umask = os.umask(0)
    os.umask(umask)
    started = multiprocessing.get_start_method(allow_none=True) or multiprocessing.get_all_start_methods()[0]
    return found | {
        "working directory": os.getcwd(),
        "umask": umask,
        "sys.path": tuple(sys.path),
        "sys.argv": tuple(sys.argv),
        "start method of multiprocessing": started,
    }


def _of_torch() -> dict[str, Any]:
    """Return settings of torch."""
    return {
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "threads of torch": torch.get_num_threads(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "deterministic algorithms only warn": torch.is_deterministic_algorithms_warn_only_enabled(),
        "filling of memory": torch.utils.deterministic.fill_uninitialized_memory,  # type: ignore[attr-defined]
        "precision of products": torch.get_float32_matmul_precision(),
        "gradients": torch.is_grad_enabled(),
        "anomaly detection": torch.is_anomaly_enabled(),
        "denormals": sys.float_info.min / 2 > 0,
        "autocast": (torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")),
        "process group": torch.distributed.is_available() and torch.distributed.is_initialized(),
    }


def _of_modules() -> dict[str, Any]:
    """Return functions and classes of m2gen's modules, which tests put others in place of."""
    return {
        f"{module}.{name}": value
        for module, found in list(sys.modules.items())
        if module.partition(".")[0] == "m2gen"
        for name, value in list(vars(found).items())
        if (callable(value) or name.isupper()) and not name.startswith("__")  # as compilers name theirs
    }


def left(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, str]:
    """Return what is otherwise than before, or is set that was not; modules may be new."""
    found = {}
    for name in {**before, **after}:
        if name.startswith("os.environ"):
            same = name in before and name in after and before[name] == after[name]
        else:
            same = name not in before or (name in after and _same(before[name], after[name]))
        if not same:
            found[name] = f"{before.get(name, 'nothing')!r:.120} became {after.get(name, 'nothing')!r:.120}"
    return found


def _same(one: Any, other: Any) -> bool:
    return one is other or (isinstance(one, (str, int, tuple, float, torch.dtype, torch.device)) and one == other)
