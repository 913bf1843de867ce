"""Train a small decoder of attention and M2RNN layers, or time such decoders.

m2gen build --spec examples.yaml
python examples/hybrid_lm/run.py train      # losses.json and losses.png in --out; interrupted, the same goes on
python examples/hybrid_lm/run.py bench      # tokens a second: attention, M2RNN, and one layer of it; needs a GPU
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import yaml

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton

import data  # noqa: E402
from model import Config, Trainer, load  # noqa: E402

SMOKE = {
    "package": "generated.tiny", "layer": "base", "mixers": ["attention", "m2rnn"], "width": 8, "heads": 2, "seq": 4,
    "batch": 1, "steps": 4, "warmup": 1, "dtype": "fp32", "compile": False, "save_every": 2,
    "text": [str(HERE.parent.parent / "LICENSE")],
}  # fmt: skip
"""A run of seconds on a CPU, which shows that everything works and nothing else."""


def store(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file whole or not at all."""
    staging = path.with_suffix(".new")
    write(staging)
    os.replace(staging, path)


def train(config: Config, out: Path) -> None:
    """Train up to the config's last step, from the checkpoint where there is one, and draw the losses."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    trainer, losses, text = Trainer(config, device), [], data.read(config.text)
    place, facts = out / "checkpoint.pt", json.loads(json.dumps(asdict(config)))
    if place.is_file():
        saved = torch.load(place, map_location=device, weights_only=True)
        changed = [key for key in facts if facts[key] != saved["config"][key] and key != "save_every"]
        if changed:
            raise SystemExit(
                f"{place} must be of this config, but has another {', '.join(changed)}; choose another --out"
            )
        trainer.restore(saved["trainer"])
        losses = saved["losses"]
        print(f"going on at step {trainer.done} from {place}", file=sys.stderr)
    recent: list[torch.Tensor] = []
    began, before = time.perf_counter(), trainer.done
    while trainer.done < config.steps:
        recent.append(trainer.step(*data.batch(text, config.batch, config.seq, config.seed, trainer.done)))
        if trainer.done % config.save_every == 0 or trainer.done == config.steps:
            losses += torch.stack(recent).tolist()
            recent = []
            saved = {"config": facts, "trainer": trainer.state(), "losses": losses}
            store(place, lambda path, saved=saved: torch.save(saved, path))
            rate = (trainer.done - before) * config.batch * config.seq / (time.perf_counter() - began)
            print(f"step {trainer.done}: loss {losses[-1]:.4f}, {rate:,.0f} tokens/s", file=sys.stderr)
    text_of_losses = json.dumps({"config": facts, "losses": losses}) + "\n"
    store(out / "losses.json", lambda path: path.write_text(text_of_losses, encoding="utf-8"))
    draw(losses, out / "losses.png")
    print(f"loss {losses[0]:.4f} at step 1, {losses[-1]:.4f} at step {len(losses)}")


def draw(losses: list[float], place: Path) -> None:
    """Draw the losses, where matplotlib is at hand."""
    try:
        import matplotlib
    except ImportError:
        print("no figure: matplotlib is missing (pip install -e '.[examples]')", file=sys.stderr)
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.5))
    axes.plot(range(1, len(losses) + 1), losses, linewidth=1)
    axes.set(xlabel="step", ylabel="loss (nats a byte)")
    figure.tight_layout()
    figure.savefig(place, dpi=120)


def bench(config: Config, out: Path) -> None:
    """Print tokens a second of training for three choices of mixers, and the part that one M2RNN layer takes."""
    if not torch.cuda.is_available():
        raise SystemExit("bench needs a GPU that torch can use")
    layers = len(config.mixers)
    one = tuple("m2rnn" if i == layers // 2 else "attention" for i in range(layers))
    models = {"attention": ("attention",) * layers, "one M2RNN layer": one, "all M2RNN": ("m2rnn",) * layers}
    rows = ["| tokens a sequence | mixers | tokens/s | ms a step | part of the M2RNN layers |", "| --- " * 5 + "|"]
    for length in config.bench.lengths:
        base = 0.0
        for name, mixers in models.items():
            sizes = {"seq": length, "batch": max(1, config.bench.tokens // length)}
            whole = timed(replace(config, mixers=mixers, **sizes))
            inside = mixer_time(replace(config, mixers=mixers, **sizes)) * mixers.count("m2rnn")
            base = base or whole
            tokens = sizes["seq"] * sizes["batch"]
            share = f"{100 * inside / whole:.0f} %" if inside else "none"
            rows.append(f"| {length} | {name} | {1e3 * tokens / whole:,.0f} | {whole:.2f} | {share} |")
            print(rows[-1], f"({base / whole:.2f} of attention's)", file=sys.stderr)
    report = f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {config.dtype}\n\n" + "\n".join(rows) + "\n"
    store(out / "bench.md", lambda path: path.write_text(report, encoding="utf-8"))
    print(report, end="")


def milliseconds(call: Callable[[], object], repeats: int) -> float:
    """Return the median milliseconds of a call on the GPU, after three that are not counted."""
    for _ in range(3):
        call()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for start, end in events:
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return sorted(start.elapsed_time(end) for start, end in events)[repeats // 2]


def timed(config: Config) -> float:
    """Return the milliseconds of a training step."""
    torch.compiler.reset()  # another model, not another shape of one
    trainer = Trainer(config, torch.device("cuda"))
    tokens = torch.randint(data.TOKENS, (config.batch, config.seq), device="cuda")
    return milliseconds(lambda: trainer.step(tokens, tokens), config.bench.steps)


def mixer_time(config: Config) -> float:
    """Return the milliseconds of one M2RNN layer's forward and backward, compiled as the model is; 0 without one."""
    if "m2rnn" not in config.mixers:
        return 0.0
    torch.compiler.reset()
    trainer = Trainer(config, torch.device("cuda"))
    layer = trainer.model.blocks[config.mixers.index("m2rnn")].mixer
    called = torch.compile(layer) if config.compile else layer
    x = torch.randn(config.batch, config.seq, config.width, device="cuda", requires_grad=True)

    def step() -> None:
        with trainer.autocast():
            y = called(x)
        y.backward(torch.ones_like(y))

    return milliseconds(step, config.bench.steps)


def main() -> None:
    """Do what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("train", "bench"))
    parser.add_argument("--config", type=Path, default=HERE / "config.yaml")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a value; YAML")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of the checkpoint and results")
    parser.add_argument("--smoke", action="store_true", help="sizes of seconds on a CPU, in Triton's interpreter")
    arguments = parser.parse_args()
    changes = dict(SMOKE) if arguments.smoke else {}
    changes |= {key: yaml.safe_load(value) for key, _, value in (item.partition("=") for item in arguments.set)}
    config = load(arguments.config, changes)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (train if arguments.what == "train" else bench)(config, arguments.out)


if __name__ == "__main__":
    main()
