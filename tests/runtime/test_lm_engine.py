"""The operator in the published training code: stand-ins of what its versions look like, without any of their code."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType

import pytest
import torch
from support import make_variant

from m2gen.problem import Problem, make_inputs

BLOCKS = "lm_engine/modeling_utils/sequence_mixer_blocks"
FIRST = "query, key, value, weight, forget_input, input_state=None, gradient_clipping=None"
OLDER = f"{FIRST}, cu_seqlens=None, max_seqlen=None"
OPERATOR = f"def m2rnn({OLDER}, *, kernel_backend=None):\n    raise AssertionError('the published operator')\n"
CALLER = """
def run(*operands, clip=None):
    return m2rnn(*operands, gradient_clipping=clip)
"""
"""What the block's module has after its imports."""
XMA = {
    "xma/__init__.py": "",
    "xma/layers/__init__.py": "from .m2rnn import m2rnn",
    "xma/layers/m2rnn/__init__.py": "from .op import m2rnn",
    "xma/layers/m2rnn/op.py": OPERATOR,
}
"""The library of kernels, which has the operator."""
FOLDERS = dict.fromkeys(
    (f"{folder}/__init__.py" for folder in ("lm_engine", "lm_engine/modeling_utils", BLOCKS, f"{BLOCKS}/m2rnn")), ""
)
VERSIONS: dict[str, Mapping[str, str]] = {
    "of the library": {**XMA, **FOLDERS, f"{BLOCKS}/m2rnn/module.py": f"from xma.layers import m2rnn\n{CALLER}"},
    "of an older library": {
        **XMA,
        **FOLDERS,
        "xma/__init__.py": "from .layers import m2rnn",
        "xma/layers/m2rnn/op.py": OPERATOR.replace(", *, kernel_backend=None", ""),
        f"{BLOCKS}/m2rnn/module.py": f"from xma import m2rnn\n{CALLER}",
    },
    "of its own": {
        **FOLDERS,
        f"{BLOCKS}/__init__.py": "from .m2rnn import m2rnn",
        f"{BLOCKS}/m2rnn/__init__.py": "from .op import m2rnn",
        f"{BLOCKS}/m2rnn/op.py": OPERATOR,
        f"{BLOCKS}/m2rnn/module.py": f"from .op import m2rnn\n{CALLER}",
    },
    "the library alone": XMA,
}
"""Where versions of the published code keep the operator."""


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Mapping[str, str]], None]]:
    """Return what installs a version, given by its files, for the time of a test."""

    def install(files: Mapping[str, str]) -> None:
        for path, text in files.items():
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_text(text, encoding="utf-8")

    monkeypatch.syspath_prepend(str(tmp_path))
    yield install
    for name in [name for name in sys.modules if name.partition(".")[0] in ("xma", "lm_engine")]:
        del sys.modules[name]


@pytest.fixture
def package(modules) -> ModuleType:
    """Return a package whose sums do not depend on the order of programs."""
    return modules("two_level_partial", "carry")


@pytest.fixture
def integration(package) -> ModuleType:
    """Return its module for the published training code."""
    return importlib.import_module(f"{package.__name__}.integrations.lm_engine")


@pytest.mark.parametrize("early", [True, False], ids=["imported before", "imported after"])
@pytest.mark.parametrize("name", [name for name in VERSIONS if name != "the library alone"])
def test_the_block_runs_this_operator(package, integration, installed, device, name, early) -> None:
    """Wherever a version keeps the operator, its block calls this package's, whenever the block was imported."""
    installed(VERSIONS[name])
    block = f"{BLOCKS.replace('/', '.')}.m2rnn.module"
    if early:
        importlib.import_module(block)
    patched = integration.patch()
    inputs = make_inputs(make_variant(), Problem(1, 2), 0).to(device)
    operands = [getattr(inputs, operand) for operand in ("q", "k", "v", "weight", "forget")]
    run = importlib.import_module(block).run
    assert torch.equal(run(*operands, clip=1.0)[0], package.m2rnn(*operands)[0])
    assert f"{block}.m2rnn" in patched.names
    assert integration.patch().places == ()
    patched.undo()
    with pytest.raises(AssertionError, match="the published operator"):
        run(*operands)


def test_the_library_alone(integration, installed) -> None:
    """Code that calls the library has every name of the operator replaced, and no other."""
    installed(VERSIONS["the library alone"])
    layers = importlib.import_module("xma.layers")
    layers.other = len
    patched = integration.patch()
    assert sorted(patched.names) == ["xma.layers.m2rnn", "xma.layers.m2rnn.m2rnn", "xma.layers.m2rnn.op.m2rnn"]
    assert layers.m2rnn is integration.compat.m2rnn
    assert layers.other is len


REFUSED: dict[str, tuple[Mapping[str, str], str]] = {
    "nothing": ({}, "no m2rnn in xma.layers.m2rnn or lm_engine.modeling_utils.sequence_mixer_blocks.m2rnn; found no"),
    "no operator": (
        {**XMA, "xma/layers/__init__.py": "", "xma/layers/m2rnn/__init__.py": ""},
        "no m2rnn in xma.layers.m2rnn or lm_engine",
    ),
    "a module of that name": (
        {**XMA, "xma/layers/__init__.py": "", "xma/layers/m2rnn/__init__.py": "from . import op as m2rnn"},
        "no m2rnn in xma.layers.m2rnn or lm_engine",
    ),
    "other arguments": (
        {**XMA, "xma/layers/m2rnn/op.py": OPERATOR.replace("weight, forget_input", "forget_input, weight")},
        "xma.layers.m2rnn.m2rnn must take (query, key, value, weight, forget_input, input_state, gradient_clipping, "
        "cu_seqlens, max_seqlen, kernel_backend), got (query, key, value, forget_input, weight,",
    ),
    "more arguments": (
        {**XMA, "xma/layers/m2rnn/op.py": OPERATOR.replace("max_seqlen=None", "max_seqlen=None, chunk=None")},
        "xma.layers.m2rnn.m2rnn must take (query, key",
    ),
    "a block elsewhere": (
        {**XMA, "lm_engine/__init__.py": ""},
        "no module lm_engine.modeling_utils.sequence_mixer_blocks.m2rnn.module, whose block calls the operator",
    ),
    "a block of its own operator": (
        {**XMA, **FOLDERS, f"{BLOCKS}/m2rnn/module.py": f"def m2rnn(*operands): return operands\n{CALLER}"},
        "lm_engine.modeling_utils.sequence_mixer_blocks.m2rnn.module does not import m2rnn from xma.layers.m2rnn",
    ),
}
"""Versions that are not known, and what is said of them."""


@pytest.mark.parametrize("name", REFUSED)
def test_versions_that_are_not_known(integration, installed, name) -> None:
    """One line says what was looked for and which versions are there; nothing is replaced."""
    files, message = REFUSED[name]
    installed(files)
    with pytest.raises(integration.UnknownVersionError, match=f"^m2rnn: {re.escape(message)}") as caught:
        integration.patch()
    assert "no lm-engine, no accelerated-model-architectures" in str(caught.value)
    ours = integration.compat.m2rnn
    theirs = [module for name, module in sys.modules.items() if name.partition(".")[0] in ("xma", "lm_engine")]
    assert not any(value is ours for module in theirs for value in vars(module).values())


def test_errors_of_the_published_code_are_its_own(integration, installed) -> None:
    """A dependency that is missing there is not taken for an unknown version."""
    installed({**XMA, "xma/layers/m2rnn/op.py": "import a_dependency_that_is_missing"})
    with pytest.raises(ModuleNotFoundError, match="a_dependency_that_is_missing"):
        integration.patch()
