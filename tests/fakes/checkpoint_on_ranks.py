"""What one rank does for tests/runtime/test_checkpoint_ranks.py: a training state written and read by other ranks."""

from __future__ import annotations

import importlib
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from layer_on_ranks import EXACT, HEADS, Subject, imported, make_layer, tokens
from ranks import serve
from torch import Tensor
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from m2gen.bench.ranks.hybrid import Hybrid, hybrid
from m2gen.bench.ranks.kinds import Mixing

HIDDEN = 12
SEQUENCES = 8
"""Sequences of a batch, which any of the numbers of ranks divides."""


def prepare(folder: Path) -> Subject:
    """Import the package that the test wrote."""
    return imported(folder, "on_ranks")


class Training:
    """A hybrid model over the ranks under FSDP, or by itself, and its optimiser."""

    def __init__(self, subject: Subject, seed: int, *, sharded: bool = True) -> None:
        layer = partial(make_layer, subject, HEADS["shared_q_k"], EXACT)
        mixings = (Mixing.M2RNN, Mixing.ATTENTION)
        self.model: Hybrid = hybrid(mixings, layer, HIDDEN, torch.device("cpu"), EXACT.dtype)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
        self.parts, self.part = (subject.ranks, subject.rank) if sharded else (1, 0)
        if sharded:
            mesh = init_device_mesh("cpu", (subject.ranks,))
            importlib.import_module(f"{subject.package.__name__}.sharding").fully_shard_decay(self.model, mesh=mesh)
            for module in (*self.model.blocks, self.model):
                fully_shard(module, mesh=mesh)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), 1e-2, eps=1e-2)  # less would blow up rounding

    def step(self) -> None:
        """Train on this rank's part of the batch.

        Losses are parts of the whole batch's mean, and not means of parts: what the recurrence carries back is clamped,
        so its gradients depend on the loss's scale.
        """
        self.optimizer.zero_grad()
        batch = tokens(EXACT.dtype, SEQUENCES, 3)
        ((self.model(batch.chunk(self.parts)[self.part]) ** 2).sum() / batch.numel()).backward()
        for parameter in self.model.parameters():
            assert parameter.grad is not None
            parameter.grad.mul_(self.parts)  # FSDP's are means over ranks
        self.optimizer.step()

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint holds."""
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer}

    def write(self, folder: Path) -> None:
        """Write a checkpoint; every rank writes what it has."""
        checkpoint.save(self.state(), checkpoint_id=folder)

    def read(self, folder: Path) -> None:
        """Read one that any number of ranks wrote."""
        state = self.state()
        checkpoint.load(state, checkpoint_id=folder)
        set_state_dict(self.model, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])

    def whole(self) -> dict[str, Tensor]:
        """Return everything that training goes on from, whole on every rank."""
        found: dict[str, Tensor] = {}
        for name, parameter in self.model.named_parameters():
            found[name] = _whole(parameter)
            for key, value in self.optimizer.state[parameter].items():
                found[f"{name} {key}"] = _whole(value)
        return found


def _whole(x: Tensor) -> Tensor:
    return (x.full_tensor() if isinstance(x, DTensor) else x).detach().clone()


def written(subject: Subject, folder: Path) -> None:
    """The first ranks train, write a checkpoint, and say what is in it and what the next step makes of it."""
    training = Training(subject, seed=0)
    training.step()
    before = training.whole()
    training.write(folder / f"of_{subject.ranks}")
    training.step()
    after = training.whole()
    if subject.rank == 0:
        torch.save({"before": before, "after": after}, folder / "expected.pt")


def read(subject: Subject, folder: Path, of: int) -> None:
    """Fewer ranks read what more wrote, bit by bit, train on to the same values, and write it for still fewer."""
    known = torch.load(folder / "expected.pt")
    training = Training(subject, seed=1)
    training.step()  # so that it has other moments
    assert differing(training.whole(), known["before"], 0.0)
    training.read(folder / f"of_{of}")
    assert differing(training.whole(), known["before"], 0.0) == []
    training.write(folder / f"of_{subject.ranks}")
    training.step()
    assert differing(training.whole(), known["after"], EXACT.tolerance) == []


def read_by_one(subject: Subject, folder: Path, of: int) -> None:
    """One process whose model no FSDP has seen reads it as well."""
    known = torch.load(folder / "expected.pt")
    training = Training(subject, seed=1, sharded=False)
    training.read(folder / f"of_{of}")
    assert differing(training.whole(), known["before"], 0.0) == []
    training.step()
    assert differing(training.whole(), known["after"], EXACT.tolerance) == []


def differing(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> list[str]:
    """Return the names of what is further apart than a tolerance, as a part of the largest element, or not in both."""
    names = found.keys() ^ expected.keys()
    for name in found.keys() & expected.keys():
        bound = tolerance * expected[name].abs().max()
        if not bool(((found[name] - expected[name]).abs() <= bound).all()):
            names = {*names, name}
    return sorted(names)


if __name__ == "__main__":
    folder, of = Path(sys.argv[1]).parent, int(Path(sys.argv[1]).name.partition("_after_")[2])
    checks: dict[str, Any] = {"read": partial(read, folder=folder, of=of)}
    if of == 0:
        checks = {"written": partial(written, folder=folder)}
    elif int(sys.argv[3]) == 1:
        checks["read_by_one"] = partial(read_by_one, folder=folder, of=of)
    serve(checks, prepare)
