"""Train a small decoder of attention and M2RNN layers, or time such decoders.

m2gen build --spec examples.yaml
python examples/hybrid_lm/run.py train      # losses.json and losses.png in --out; interrupted, the same goes on
python examples/hybrid_lm/run.py compare    # kernels and the reference backend over some seeds; minutes on a GPU
python examples/hybrid_lm/run.py bench      # tokens a second of each kind of model; needs a GPU
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib import metadata
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without which cuBLAS is not deterministic

import compare  # noqa: E402
import data  # noqa: E402
from files import alone, reachable, write_json, write_text  # noqa: E402
from loop import device_at_hand, draw, facts_of, train  # noqa: E402
from model import Config, Trainer, load  # noqa: E402
from settings import changes_of  # noqa: E402

SMOKE = {
    "package": "generated.tiny", "layer": "base", "mixers": ["attention", "m2rnn"], "width": 8, "heads": 2, "seq": 4,
    "batch": 1, "steps": 4, "warmup": 1, "dtype": "fp32", "compile": False, "save_every": 2,
    "text": [str(HERE.parent.parent / "LICENSE")], "compare": {"seeds": [0, 1], "seq": 4, "steps": 4},
}  # fmt: skip
"""A run of seconds on a CPU, which shows that everything works and nothing else."""


def train_and_draw(config: Config, out: Path) -> None:
    """Train up to the config's last step, and write the losses and their figure."""
    losses = train(config, out)
    digest = data.digest_of(data.read(config.text))
    write_json({"config": facts_of(config), "sha256_of_text": digest, "losses": losses}, out / "losses.json")
    draw({"loss": (losses, "-")}, out / "losses.png")
    print(f"loss {losses[0]:.4f} at step 1, {losses[-1]:.4f} at step {len(losses)}")


def bench(config: Config, out: Path, timing_only: bool = False) -> None:
    """Print tokens a second of training for each choice of mixers, and the part that the M2RNN layers take.

    flash-linear-attention's Gated DeltaNet refuses some versions of Triton, which ``timing_only`` passes; a row of what
    cannot be timed says why.
    """
    if not torch.cuda.is_available():
        raise SystemExit("bench needs a GPU that torch can use")
    config = replace(config, compile=config.bench.compile)
    layers = len(config.mixers)
    one = tuple("m2rnn" if i == layers // 2 else "attention" for i in range(layers))
    models = {"attention": ("attention",) * layers, "one M2RNN layer": one, "all M2RNN": ("m2rnn",) * layers}
    models["all Gated DeltaNet of flash-linear-attention"] = ("gated_deltanet_fla",) * layers
    models["all Gated DeltaNet"] = ("gated_deltanet",) * layers
    mark = passed_guard() if timing_only else ""
    rows = ["| tokens a sequence | mixers | tokens/s | ms a step | part of the M2RNN layers |", "| --- " * 5 + "|"]
    for length in config.bench.lengths:
        base = 0.0
        for name, mixers in models.items():
            sizes = {"seq": length, "batch": max(1, config.bench.tokens // length)}
            try:
                whole = timed(replace(config, mixers=mixers, **sizes))
            except (SystemExit, RuntimeError, ValueError) as error:
                if not {"gated_deltanet", "gated_deltanet_fla"} & set(mixers):
                    raise
                rows.append(f"| {length} | {name} | not timed: {' '.join(str(error).split())} | | |")
                continue
            inside = mixer_time(replace(config, mixers=mixers, **sizes)) * mixers.count("m2rnn")
            base = base or whole
            tokens = sizes["seq"] * sizes["batch"]
            share = f"{100 * inside / whole:.0f} %" if inside else "none"
            shown = f"{name} (timing only)" if mark and "gated_deltanet_fla" in mixers else name
            rows.append(f"| {length} | {shown} | {1e3 * tokens / whole:,.0f} | {whole:.2f} | {share} |")
            print(rows[-1], f"({base / whole:.2f} of attention's)", file=sys.stderr)
            write_report(config, rows, mark, out)
    print(write_report(config, rows, mark, out), end="")


def write_report(config: Config, rows: list[str], mark: str, out: Path) -> str:
    """Write and return the table, with the versions that it is of."""
    names = ("triton", "flash-linear-attention")
    versions = "".join(f", {name} {installed(name)}" for name in names if installed(name))
    head = f"{torch.cuda.get_device_name()}, torch {torch.__version__}{versions}, {config.dtype}\n"
    report = "\n".join([head, *rows, *(["", f"Timing only: {mark}."] if mark else []), ""])
    write_text(report, out / "bench.md")
    return report


def installed(name: str) -> str:
    """Return the version of an installed package, or nothing."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def passed_guard() -> str:
    """Let flash-linear-attention run where it refuses to, and return why it does; nothing without it."""
    from tools.gated_deltanet import pass_guard

    try:
        return pass_guard()
    except ImportError:
        return ""


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
    trainer = Trainer(config, device_at_hand())
    tokens = torch.randint(data.TOKENS, (config.batch, config.seq), device=trainer.device)
    return milliseconds(lambda: trainer.step(tokens, tokens), config.bench.steps)


def mixer_time(config: Config) -> float:
    """Return the milliseconds of one M2RNN layer's forward and backward, compiled as the model is; 0 without one."""
    if "m2rnn" not in config.mixers:
        return 0.0
    torch.compiler.reset()
    trainer = Trainer(config, device_at_hand())
    layer = trainer.model.blocks[config.mixers.index("m2rnn")].mixer
    called = torch.compile(layer, fullgraph=True, dynamic=False) if config.compile else layer
    x = torch.randn(config.batch, config.seq, config.width, device=trainer.device, requires_grad=True)
    wanted = [x, *layer.parameters()]

    def step() -> None:
        with trainer.autocast():
            y = called(x)
        torch.autograd.grad(y, wanted, torch.ones_like(y))

    return milliseconds(step, config.bench.steps)


def main() -> None:
    """Do what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("train", "compare", "bench"))
    parser.add_argument("--config", type=Path, default=HERE / "config.yaml")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a value; YAML")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of the checkpoint and results")
    parser.add_argument("--smoke", action="store_true", help="sizes of seconds on a CPU, in Triton's interpreter")
    parser.add_argument("--timing-only", action="store_true", help="bench: also time what its package refuses, marked")
    arguments = parser.parse_args()
    changes = dict(SMOKE) if arguments.smoke else {}
    changes |= changes_of(arguments.set)
    config = load(arguments.config, changes)
    benchmark = partial(bench, timing_only=arguments.timing_only)
    with alone(arguments.out):
        {"train": train_and_draw, "compare": compare.compare, "bench": benchmark}[arguments.what](config, arguments.out)


if __name__ == "__main__":
    with reachable():
        main()
