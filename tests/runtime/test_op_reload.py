"""Operators outlast the modules they came with: reloads, rebuilds, copies, and purges of ``sys.modules``."""

from __future__ import annotations

import ast
import gc
import importlib
import linecache
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import pytest
import torch
from calls import Results, arguments, assert_close, assert_same, differentiate
from support import build_package, make_schedule, make_variant
from torch import Tensor

from m2gen.problem import Inputs, Problem, make_inputs
from m2gen.runtime import snapshot
from m2gen.schedule import Schedule
from m2gen.variant import Variant

VARIANT = make_variant()
BEFORE = make_schedule("partial", interval=4)
AFTER = make_schedule("partial", interval=6, unroll=3)
"""Saves as many states of five steps as ``BEFORE``, two, but other ones."""
EPS = torch.finfo(torch.float32).eps


@pytest.fixture
def inputs(device: torch.device) -> Inputs:
    """Return operands of one sequence that is longer than an interval."""
    return make_inputs(VARIANT, Problem(1, 5, initial_state=True), seed=1).to(device)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Return where to write a package to import it by the folder's name, which is forgotten afterwards."""
    monkeypatch.syspath_prepend(tmp_path)
    folder = tmp_path / f"m2gen_{tmp_path.name}"
    yield folder
    purge(folder.name)
    purge(f"{folder.name}_twin")


def write(folder: Path, schedule: Schedule, variants: tuple[Variant, ...], name: str | None = None) -> None:
    """Build a package as ``m2gen build`` does over an earlier one: no file of that is left."""
    files = build_package(name or folder.name, variants, schedule).files
    for path in [*folder.rglob("*.py"), *folder.rglob("*.pyc")]:  # or Python takes the old bytecode of equal size
        path.unlink()
    for path, text in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text, encoding="utf-8")
    importlib.invalidate_caches()


def imported(folder: Path, schedule: Schedule = BEFORE, name: str | None = None) -> ModuleType:
    """Build and import a package, whose content is that of any other of this ``name``, by default the folder's."""
    write(folder, schedule, (VARIANT,), name)
    return importlib.import_module(folder.name)


def imported_twin(folder: Path) -> ModuleType:
    """Build and import a package of the same kernels under another name."""
    twin = folder.with_name(f"{folder.name}_twin")
    write(twin, BEFORE, (VARIANT,))
    return importlib.import_module(twin.name)


def modules_of(name: str) -> list[ModuleType]:
    """Return a package's modules in the order of their import, which is the one that IPython reloads them in."""
    return [module for key, module in sys.modules.items() if key == name or key.startswith(f"{name}.")]


def purge(name: str) -> None:
    """Forget a package's modules, as test runners and plugin hosts do."""
    for module in modules_of(name):
        del sys.modules[module.__name__]
    gc.collect()


def recorded(package: ModuleType, inputs: Inputs) -> Callable[[], Results]:
    """Run a forward, and return what runs its backward."""
    leaves = {name: x.detach().clone().requires_grad_() for name, x in arguments(inputs).items()}
    y, state = package.m2rnn(**leaves)

    def backward() -> Results:
        incoming = [inputs.dy.to(y.dtype), inputs.dstate.to(state.dtype)]
        gradients = torch.autograd.grad([y, state], list(leaves.values()), incoming)
        return {"y": y.detach(), "state": state.detach()} | {
            f"d{name}": x for name, x in zip(leaves, gradients, strict=True)
        }

    return backward


def autoreload(module: ModuleType) -> None:
    """Reload as IPython's autoreload does: from nothing but a name, and functions that others imported get new code."""
    before = dict(vars(module))
    vars(module).clear()
    vars(module).update(__name__=before["__name__"], __loader__=before["__loader__"])
    importlib.reload(module)
    for name, old in before.items():
        new = getattr(module, name, None)
        if isinstance(old, FunctionType) and isinstance(new, FunctionType) and old.__module__ == module.__name__:
            old.__code__, old.__defaults__ = new.__code__, new.__defaults__


def is_literal(node: ast.stmt) -> bool:
    """Say whether a statement is an assignment of a literal, which can be executed alone."""
    return isinstance(node, ast.Assign) and not any(isinstance(x, ast.Name | ast.Call) for x in ast.walk(node.value))


def patching(sources: dict[str, str]) -> Callable[[ModuleType], None]:
    """Return IPython's quicker way: where only functions and literals are others, nothing else is executed again."""

    def reload(module: ModuleType) -> None:
        old, new = ast.parse(sources[module.__name__]), ast.parse(source_of(module))
        alone = [node for node in new.body if isinstance(node, ast.FunctionDef) or is_literal(node)]
        rest = [
            [ast.unparse(node) for node in tree.body[1:] if not (isinstance(node, ast.FunctionDef) or is_literal(node))]
            for tree in (old, new)
        ]
        if rest[0] != rest[1]:
            autoreload(module)
        else:
            exec(compile(ast.Module(alone, []), str(module.__file__), "exec"), vars(module))

    return reload


def source_of(module: ModuleType) -> str:
    """Return the source of a module on disk."""
    return Path(str(module.__file__)).read_text(encoding="utf-8")


ORDERS: dict[str, Callable[[list[ModuleType]], list[ModuleType]]] = {
    "as imported": list,
    "backwards": lambda modules: modules[::-1],
    "library": lambda modules: [module for module in modules if module.__name__.endswith(".library")],
    "built": lambda modules: [module for module in modules if module.__name__.endswith(".built")],
    "dispatch": lambda modules: [module for module in modules if module.__name__.endswith(".dispatch")],
    "twice": lambda modules: [*modules, *modules],
}


@pytest.fixture
def apart(folder: Path) -> str:
    """Return the name of a module of one value, which says when it is executed."""
    folder.with_suffix(".py").write_text("import m2gen_probe\n\nVALUE = m2gen_probe.entered()\n", encoding="utf-8")
    importlib.invalidate_caches()
    return folder.name


def probe(monkeypatch: pytest.MonkeyPatch, entered: Callable[[], object]) -> None:
    """Have such modules call a function when they are executed."""
    module = ModuleType("m2gen_probe")
    vars(module)["entered"] = entered
    monkeypatch.setitem(sys.modules, "m2gen_probe", module)


def test_threads_that_need_a_module_at_once_have_one(apart: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second waits for what the first executes, and neither sees half of it."""
    inside, together, found = list[int](), threading.Event(), list[ModuleType]()

    def entered() -> int:
        inside.append(len(inside))
        together.set() if len(inside) > 1 else together.wait(0.5)
        return len(inside)

    probe(monkeypatch, entered)
    module = snapshot.deferred(apart)
    threads = [threading.Thread(target=lambda: found.append(module())) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert inside == [0]
    assert found[0] is found[1] is module()
    assert found[0].VALUE == 1


def test_a_deferred_module_leaves_no_trace(apart: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is found by its name while it is executed; afterwards tables have what they had, or nothing."""
    seen = list[ModuleType]()
    probe(monkeypatch, lambda: seen.append(sys.modules[apart]))
    made = snapshot.deferred(apart)()
    path = str(made.__file__)
    assert (seen, apart in sys.modules, path in linecache.cache) == ([made], False, False)
    usual = importlib.import_module(apart)
    lines = linecache.getlines(path)
    again = snapshot.deferred(apart)()
    assert seen == [made, usual, again]
    assert len({id(module) for module in seen}) == 3
    assert sys.modules[apart] is usual
    assert linecache.cache[path][2] is lines
    linecache.cache.pop(path)


@pytest.mark.parametrize("order", ORDERS)
def test_reloading_the_same_package(folder: Path, inputs: Inputs, order: str) -> None:
    """Whatever is reloaded, calls go on as before, and so does the backward of what was made before."""
    package = imported(folder)
    expected = differentiate(package.m2rnn, inputs)
    backward = recorded(package, inputs)
    for module in ORDERS[order](modules_of(folder.name)):
        importlib.reload(module)
    gc.collect()
    assert_same(backward(), expected)
    assert_same(differentiate(package.m2rnn, inputs), expected)


RELOADS: dict[str, Callable[[dict[str, str]], Callable[[ModuleType], Any]]] = {
    "importlib": lambda sources: importlib.reload,
    "IPython": lambda sources: autoreload,
    "IPython, patching": patching,
}


def refuse(patch: pytest.MonkeyPatch, operators: ModuleType, direction: str, message: str) -> None:
    """Have a test fail that launches a kernel of what serves these operators, or calls its launcher."""

    class Kernel:
        def __getitem__(self, grid: tuple[int, ...]) -> None:
            pytest.fail(message)

    for table in operators.launches.dispatch.KERNELS.values():
        for kernels in table.values():
            patch.setattr(kernels[0], f"m2rnn_{direction}_kernel", Kernel())
    patch.setattr(operators.launches.launchers, direction, lambda *_: pytest.fail(message))


def test_kernels_are_read_with_the_package_and_executed_when_needed(folder: Path, inputs: Inputs) -> None:
    """A variant that no call needs costs nothing, and one that is needed late is as it was when it was imported."""
    write(folder, BEFORE, (VARIANT, make_variant(8, 8)))
    kernels = folder / "kernels"
    for path in kernels.glob("*k8_v8*.py"):
        path.write_text("raise RuntimeError('executed')", encoding="utf-8")
    package = importlib.import_module(folder.name)
    expected = differentiate(imported_twin(folder).m2rnn, inputs)
    for path in kernels.glob("*.py"):
        path.write_text("raise RuntimeError('of another build')", encoding="utf-8")
    assert_same(differentiate(package.m2rnn, inputs), expected)
    other = make_inputs(make_variant(8, 8), Problem(1, 2), seed=1)
    with pytest.raises(RuntimeError, match="executed"):
        package.m2rnn(**arguments(other))


@pytest.mark.parametrize("way", RELOADS)
@pytest.mark.parametrize("order", ["as imported", "backwards", "built"])
def test_a_package_built_again(folder: Path, inputs: Inputs, way: str, order: str) -> None:
    """The new kernels serve new calls, and what was made by the old ones finds those, whose files are gone.

    ``built`` is the only module of which another is written where copies of the runtime stay the same.
    """
    more = make_variant(8, 8)
    package = imported(folder)
    expected = differentiate(package.m2rnn, inputs)
    backward = recorded(package, inputs)
    with torch.no_grad():
        package.m2rnn(**arguments(inputs))  # which remembers what it launched
    before = sys.modules[f"{folder.name}.library"].OPERATORS
    reload = RELOADS[way]({module.__name__: source_of(module) for module in modules_of(folder.name)})
    write(folder, AFTER, (VARIANT, more))
    for module in ORDERS[order](modules_of(folder.name)):
        reload(module)
    gc.collect()
    now = sys.modules[f"{folder.name}.library"].OPERATORS
    assert now.NAMESPACE != before.NAMESPACE
    with pytest.MonkeyPatch.context() as patch:
        refuse(patch, now, "backward", "must not serve an older graph")
        assert_same(backward(), expected)
    assert_close(differentiate(package.m2rnn, inputs), expected, 64 * EPS)
    with pytest.MonkeyPatch.context() as patch:
        refuse(patch, before, "forward", "must serve no call any more")
        with torch.no_grad():
            package.m2rnn(**arguments(inputs))
    added = make_inputs(more, Problem(1, 2), seed=1).to(inputs.q.device)
    assert package.m2rnn(**arguments(added))[0].shape == added.dy.shape


def test_a_backward_that_runs_first_after_its_files_are_gone(folder: Path, inputs: Inputs) -> None:
    """Kernels that never ran before their files were replaced run as they were imported."""
    package = imported(folder, BEFORE)
    backward = recorded(package, inputs)
    write(folder, AFTER, (VARIANT,))
    for module in modules_of(folder.name):
        importlib.reload(module)
    assert_close(backward(), differentiate(package.m2rnn, inputs), 64 * EPS)


def test_a_purged_package(folder: Path, inputs: Inputs) -> None:
    """A graph, the package that made it, and one imported in its place work when nobody else knows the modules."""
    package = imported(folder)
    expected = differentiate(package.m2rnn, inputs)
    backward = recorded(package, inputs)
    purge(folder.name)
    assert_same(differentiate(package.m2rnn, inputs), expected)
    del package
    gc.collect()
    assert_same(backward(), expected)
    again = imported(folder)
    assert_same(differentiate(again.m2rnn, inputs), expected)


def test_two_copies_of_which_the_first_goes(folder: Path, inputs: Inputs) -> None:
    """A copy that found the operators there works without the one that defined them."""
    too = folder.with_name(f"{folder.name}_too")
    first = imported(folder)
    other = imported(too, name=folder.name)
    expected = differentiate(first.m2rnn, inputs)
    backward = recorded(first, inputs)
    del first
    purge(folder.name)
    importlib.reload(sys.modules[f"{too.name}.library"])
    gc.collect()
    assert_same(differentiate(other.m2rnn, inputs), expected)
    assert_same(backward(), expected)
    purge(too.name)


def test_two_packages_side_by_side(folder: Path, inputs: Inputs) -> None:
    """Reloading one leaves the other's operators alone."""
    too = folder.with_name(f"{folder.name}_too")
    one, other = imported(folder), imported(too, AFTER)
    expected = [differentiate(package.m2rnn, inputs) for package in (one, other)]
    graphs = [recorded(package, inputs) for package in (one, other)]
    for module in modules_of(folder.name):
        importlib.reload(module)
    assert_same(graphs[0](), expected[0])
    assert_same(graphs[1](), expected[1])
    assert_same(differentiate(other.m2rnn, inputs), expected[1])
    purge(too.name)


def test_steps_after_a_reload(folder: Path, inputs: Inputs) -> None:
    """Decoding, which writes in place, goes on, too."""
    package = imported(folder)
    token = {name: getattr(inputs, name)[:, 0] for name in ("q", "k", "v", "forget")}

    def stepped() -> tuple[Tensor, Tensor]:
        y, state = package.m2rnn_step(**token, weight=inputs.weight, state=inputs.initial_state.clone())
        return y, state

    expected = stepped()
    for module in modules_of(folder.name):
        importlib.reload(module)
    assert all(torch.equal(one, other) for one, other in zip(stepped(), expected, strict=True))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):  # through the dispatcher
        assert all(torch.equal(one, other) for one, other in zip(stepped(), expected, strict=True))


@pytest.mark.parametrize("order", ["as imported", "backwards", "built"])
def test_a_layer_whose_package_is_built_again(folder: Path, inputs: Inputs, order: str) -> None:
    """Graphs of the layer's own operator end with the kernels that began them, and new calls get the new ones."""
    package = imported(folder)
    heads = dict(zip("qkvfw", VARIANT.heads.counts, strict=True))
    torch.manual_seed(0)
    options = {"backend": "kernels", "device": inputs.q.device}
    layer = package.M2RNN(12, VARIANT.state_expansion, VARIANT.head_dim, heads, **options)
    x = torch.randn(1, 5, 12).to(inputs.q.device)
    wanted = list(layer.parameters())
    expected = torch.autograd.grad(layer(x).square().sum(), wanted)
    layer(x)  # what is known of such calls is of the old kernels
    pending = layer(x).square().sum()
    before = sys.modules[f"{folder.name}.library"].OPERATORS
    write(folder, AFTER, (VARIANT,))
    for module in ORDERS[order](modules_of(folder.name)):
        importlib.reload(module)
    gc.collect()
    now = sys.modules[f"{folder.name}.library"].OPERATORS
    again = sys.modules[f"{folder.name}.layer"].M2RNN(12, VARIANT.state_expansion, VARIANT.head_dim, heads, **options)
    again.load_state_dict(layer.state_dict())
    with pytest.MonkeyPatch.context() as patch:
        refuse(patch, before, "forward", "must serve no call any more")
        found = torch.autograd.grad(again(x).square().sum(), list(again.parameters()))
    for one, other in zip(found, expected, strict=True):
        assert_close({"gradient": one}, {"gradient": other}, 256 * EPS)
    with pytest.MonkeyPatch.context() as patch:
        refuse(patch, now, "backward", "must not serve an older graph")
        old = torch.autograd.grad(pending, wanted)
    assert all(torch.equal(one, other) for one, other in zip(old, expected, strict=True))
