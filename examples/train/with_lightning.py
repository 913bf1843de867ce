"""Lightning: parameter groups, mixed precision, compile, packed batches, checkpoints.

python examples/train/with_lightning.py --package generated.h100 --out /tmp/lightning
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning
import torch
from documents import batch_of, small_model
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor


class Training(lightning.LightningModule):
    """A model's steps, and the loss of each."""

    def __init__(self, model: Any, package: str, compiled: bool = False) -> None:
        super().__init__()
        self.model, self.package, self.losses = model, package, []
        if compiled:
            self.model.compile(fullgraph=True)  # in place, so that names in checkpoints stay as they are

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return an optimiser that leaves norms, D and decay parameters without weight decay."""
        groups = importlib.import_module(self.package).parameter_groups(self.model, weight_decay=0.1)
        return torch.optim.AdamW(groups, lr=1e-3)

    def training_step(self, batch: dict[str, Any], number: int) -> Tensor:
        """Return the loss of a packed batch."""
        loss: Tensor = self.model(**batch).loss
        self.losses.append(loss.detach())
        return loss


class Batches:
    """A loader of packed batches; checkpoints hold how many it has given, so that a run that goes on has the next."""

    def __init__(self) -> None:
        self.given = 0

    def __len__(self) -> int:
        return 10**6  # steps of an epoch, which says that nothing needs to be fetched ahead

    def __iter__(self) -> Iterator[dict[str, Any]]:
        while True:
            self.given += 1
            yield batch_of(self.given - 1)

    def state_dict(self) -> dict[str, int]:
        """Return what a checkpoint holds."""
        return {"given": self.given}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on after a checkpoint."""
        self.given = state["given"]


class Ending(lightning.Callback):
    """Writes the checkpoint of the last step, which ``ModelCheckpoint`` does not between two of its own."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def on_train_batch_end(self, trainer: lightning.Trainer, *_: Any) -> None:
        """Write it after the step."""
        if trainer.global_step == trainer.max_steps:
            trainer.save_checkpoint(self.place)


def train(model: Any, package: str, out: Path, steps: int, **options: Any) -> list[float]:
    """Train up to ``steps``, from the checkpoint in ``out`` where there is one, and return the losses of this run."""
    on_gpu = torch.cuda.is_available()
    place = out / "last.ckpt"
    saving = ModelCheckpoint(out, filename="last", every_n_train_steps=min(steps, 100), enable_version_counter=False)
    trainer = lightning.Trainer(
        **{
            "max_steps": steps, "precision": "bf16-mixed" if on_gpu else "32-true", "gradient_clip_val": 1.0,
            "devices": 1, "logger": False, "enable_progress_bar": False, "callbacks": [saving, Ending(place)],
            **options,
        }
    )  # fmt: skip
    training = Training(model.train(), package, compiled=on_gpu)
    trainer.fit(training, Batches(), ckpt_path=str(place) if place.exists() else None)
    return torch.stack(training.losses).tolist() if training.losses else []


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--package", default="generated.h100")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=200)
    given = parser.parse_args()
    found = train(small_model(given.package), given.package, given.out, given.steps)
    print(f"{len(found)} steps, last losses {found[-3:]}")
