"""The Trainer of transformers: parameter groups, mixed precision, compile, packed batches, checkpoints.

python examples/train/hf_trainer.py --package generated.h100 --out /tmp/trainer
"""

from __future__ import annotations

import argparse
import importlib
import json
from pathlib import Path
from typing import Any

import torch
from documents import Packed, documents, small_model
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import sort_checkpoints


def last_whole(out: Path) -> str | None:
    """Return the last checkpoint that was written to its end, None without one.

    The Trainer writes its own state last: a run that was ended before leaves a checkpoint with none, or a part of it.
    """
    for folder in reversed(sort_checkpoints(str(out))):
        try:
            json.loads((Path(folder) / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        return folder
    return None


def trainer_of(model: Any, package: str, out: Path, steps: int, **options: Any) -> Trainer:
    """Return a trainer of packed batches; ``options`` are further ``TrainingArguments``."""
    groups = importlib.import_module(package).parameter_groups(model, weight_decay=0.1)
    optimizer = torch.optim.AdamW(groups, lr=1e-3)  # the Trainer's own decays norms, D and A_log
    on_gpu = torch.cuda.is_available()
    arguments = TrainingArguments(
        **{
            "output_dir": str(out), "max_steps": steps, "save_steps": max(1, steps // 2), "logging_steps": 1,
            "per_device_train_batch_size": 4, "learning_rate": 1e-3, "lr_scheduler_type": "constant",
            "bf16": on_gpu, "torch_compile": on_gpu, "use_cpu": not on_gpu, "report_to": "none", **options,
        }
    )  # fmt: skip
    return Trainer(model, arguments, train_dataset=documents(), data_collator=Packed(), optimizers=(optimizer, None))


def train(model: Any, package: str, out: Path, steps: int, **options: Any) -> list[float]:
    """Train up to ``steps``, from the last checkpoint in ``out`` where there is one, and return all losses."""
    trainer = trainer_of(model, package, out, steps, **options)
    trainer.train(resume_from_checkpoint=last_whole(out))
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--package", default="generated.h100")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=200)
    given = parser.parse_args()
    found = train(small_model(given.package), given.package, given.out, given.steps)
    print(f"{len(found)} steps, last losses {found[-3:]}")
