"""Train a small character model whose mixer is a generated package's ``m2rnn``, beside the same model in eager PyTorch.

Run it from the repository root, where the generated packages are:

    python examples/char_lm.py --package generated.h100 --out examples/char_lm.png

The text is the repository's LICENSE. Both backends start from the same parameters and see the same batches, so their
loss curves differ by rounding alone; each run prints them side by side and writes them as JSON and as a figure.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from files import reachable, write_text
from torch import Tensor, nn
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # a script's sys.path begins with its own folder; the packages are one up

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
KERNELS, REFERENCE = "kernels", "reference"

# (q, k, v, weight, forget) -> y
Mixer = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Config:
    """All that decides a run; K, V, the head counts and the dtype must be a variant of the package."""

    heads: tuple[int, int, int, int, int] = (8, 8, 8, 8, 8)  # of q, k, v, the forget gate and the state weight
    state_expansion: int = 64  # K
    head_dim: int = 64  # V
    dtype: str = "bf16"
    layers: int = 2
    width: int = 256
    batch: int = 16
    seq: int = 128
    steps: int = 200
    warmup: int = 20
    learning_rate: float = 2e-3
    seed: int = 0


@dataclass(frozen=True)
class Run:
    """One backend's training: the loss and the wall time of each step."""

    losses: list[float]
    milliseconds: list[float]

    @property
    def typical(self) -> float:
        """Median milliseconds per step, without the first, which compiles."""
        return statistics.median(self.milliseconds[1:] or self.milliseconds)


# ------------------------------------------------------------------------------------------------------- backends


def kernels_mixer(package: str) -> Mixer:
    """Return the operator of a generated package."""
    m2rnn = importlib.import_module(package).m2rnn
    return lambda *operands: m2rnn(*operands, output_final_state=False)[0]


def reference_mixer() -> Mixer:
    """Return the eager recurrence, its state and products in float32 whatever the operands' dtype."""
    from m2gen.runtime.reference import Arithmetic, m2rnn

    arithmetic = Arithmetic(state=torch.float32, operand=torch.float32)

    def mixer(q: Tensor, k: Tensor, v: Tensor, weight: Tensor, forget: Tensor) -> Tensor:
        with torch.autocast(q.device.type, enabled=False):  # else the product with the weight would be in bf16
            return m2rnn(q, k, v, weight, forget, arithmetic=arithmetic)[0]

    return mixer


# ---------------------------------------------------------------------------------------------------------- model


class M2RNNMixer(nn.Module):
    """Projections to q, k, v, gate and forget gate; the recurrence; a gated norm; the projection back."""

    def __init__(self, config: Config, mixer: Mixer) -> None:
        super().__init__()
        q, k, v, f, w = config.heads
        self.mixer, self.dtype = mixer, DTYPES[config.dtype]
        self.key_dim, self.value_dim = config.state_expansion, config.head_dim
        inner = max(config.heads) * self.value_dim
        self.sizes = (q * self.key_dim, k * self.key_dim, v * self.value_dim, f, inner)
        self.project_in = nn.Linear(config.width, sum(self.sizes), bias=False)
        self.project_out = nn.Linear(inner, config.width, bias=False)
        self.norm = nn.RMSNorm(self.value_dim, eps=1e-6)
        self.weight = nn.Parameter(torch.eye(self.value_dim).repeat(w, 1, 1))
        step = torch.empty(f).uniform_(math.log(1e-3), math.log(1e-1)).exp()
        self.dt_bias = nn.Parameter(step + torch.log(-torch.expm1(-step)))  # softplus of this is step
        self.A_log = nn.Parameter(torch.empty(f).uniform_(1, 16).log())

    def forward(self, x: Tensor) -> Tensor:
        q, k, v, f, gate = self.project_in(x).split(self.sizes, -1)
        q = F.normalize(q.unflatten(-1, (-1, self.key_dim)).float(), dim=-1)
        k = F.normalize(k.unflatten(-1, (-1, self.key_dim)).float(), dim=-1)
        v = v.unflatten(-1, (-1, self.value_dim))
        # In float32: rounded to bf16, a gate above 0.998 would be 1, and its head would never write.
        forget = torch.exp(-self.A_log.exp() * F.softplus(f.float() + self.dt_bias))
        q, k, v, weight = (operand.to(self.dtype) for operand in (q, k, v, self.weight))
        y = self.norm(self.mixer(q, k, v, weight, forget).float())
        return self.project_out(y.flatten(-2) * F.silu(gate))


class Block(nn.Module):
    """The mixer and an MLP, each on a residual branch behind its norm."""

    def __init__(self, config: Config, mixer: Mixer) -> None:
        super().__init__()
        self.mixer_norm = nn.RMSNorm(config.width, eps=1e-6)
        self.mixer = M2RNNMixer(config, mixer)
        self.mlp_norm = nn.RMSNorm(config.width, eps=1e-6)
        self.mlp = nn.Sequential(
            nn.Linear(config.width, 4 * config.width, bias=False),
            nn.GELU(),
            nn.Linear(4 * config.width, config.width, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mixer(self.mixer_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class CharacterModel(nn.Module):
    """Embedding, blocks, norm, head: characters (B, S) to logits (B, S, vocabulary)."""

    def __init__(self, config: Config, vocabulary: int, mixer: Mixer) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, config.width)
        self.blocks = nn.Sequential(*(Block(config, mixer) for _ in range(config.layers)))
        self.norm = nn.RMSNorm(config.width, eps=1e-6)
        self.head = nn.Linear(config.width, vocabulary, bias=False)

    def forward(self, characters: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.embedding(characters))))


# ------------------------------------------------------------------------------------------------------- training


def read_text(path: Path) -> tuple[Tensor, int]:
    """Return the text as indices into its sorted alphabet, and the size of that."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise SystemExit(f"--text {path} must be UTF-8: {error}") from None
    alphabet = {character: index for index, character in enumerate(sorted(set(text)))}
    return torch.tensor([alphabet[character] for character in text]), len(alphabet)


def draw_batches(text: Tensor, config: Config) -> Tensor:
    """Return (steps, batch, seq + 1) characters from random places: inputs and, one on, their targets."""
    generator = torch.Generator().manual_seed(config.seed)
    last = len(text) - config.seq
    if last < 1:
        raise SystemExit(f"char_lm: the text has {len(text)} characters, too few for --seq {config.seq}")
    starts = torch.randint(last, (config.steps, config.batch, 1), generator=generator)
    return text[starts + torch.arange(config.seq + 1)]


def train(config: Config, mixer: Mixer, text: Tensor, vocabulary: int, device: torch.device) -> Run:
    """Train from the config's seed; the backend changes nothing but the mixer."""
    torch.manual_seed(config.seed)
    model = CharacterModel(config, vocabulary, mixer).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=config.learning_rate, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / config.warmup))
    dtype = DTYPES[config.dtype]
    run = Run([], [])
    for batch in draw_batches(text, config).to(device):
        start = time.perf_counter()
        with torch.autocast(device.type, dtype, enabled=dtype is not torch.float32):
            logits = model(batch[:, :-1])
        loss = F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        run.losses.append(loss.item())
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        run.milliseconds.append(1e3 * (time.perf_counter() - start))
    return run


# --------------------------------------------------------------------------------------------------------- report


def differences(runs: dict[str, Run]) -> tuple[float, float] | None:
    """Return the largest and the mean absolute difference between the two curves, if there are two."""
    if len(runs) < 2:
        return None
    gaps = [abs(a - b) for a, b in zip(runs[KERNELS].losses, runs[REFERENCE].losses, strict=True)]
    return max(gaps), statistics.fmean(gaps)


def print_table(runs: dict[str, Run]) -> None:
    """Print the loss at a few steps and the time per step of each backend, then how far the curves are apart."""
    length = len(next(iter(runs.values())).losses)
    steps = sorted({step for step in (1, 50, 100, 200, length) if step <= length})
    print("".join([f"{'backend':<10}", *(f"{f'loss@{step}':>10}" for step in steps), f"{'ms/step':>10}"]))
    for name, run in runs.items():
        losses = (f"{run.losses[step - 1]:>10.4f}" for step in steps)
        print("".join([f"{name:<10}", *losses, f"{run.typical:>10.2f}"]))
    if gaps := differences(runs):
        print(f"difference of the loss over {length} steps: largest {gaps[0]:.2e}, mean {gaps[1]:.2e}")


def write_json(path: Path, runs: dict[str, Run], facts: dict[str, object]) -> None:
    """Write the facts of the run, the curves and the times."""
    gaps = differences(runs)
    record = {
        **facts,
        "difference": None if gaps is None else {"largest": gaps[0], "mean": gaps[1]},
        "ms_per_step": {name: round(run.typical, 3) for name, run in runs.items()},
        "loss": {name: run.losses for name, run in runs.items()},
    }
    write_text(json.dumps(record, indent=1) + "\n", path)


def read_curves(path: Path) -> tuple[dict[str, list[float]], str | None]:
    """Return the curves and the package of an earlier run; a file of another form ends the program."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return {name: [float(loss) for loss in losses] for name, losses in record["loss"].items()}, record["package"]
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise SystemExit(f"--redraw {path} must be the JSON of an earlier run, got {error!r}") from None


def draw_figure(path: Path, losses: dict[str, list[float]], package: str | None) -> None:
    """Draw the curves, the reference wide and pale, so that the other is seen on top of it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), dpi=100, layout="constrained")
    for name, label, color, width in (
        (REFERENCE, "eager reference", "#f2a65a", 5.0),
        (KERNELS, package, "#1f3b73", 1.4),
    ):
        if name in losses:
            axes.plot(range(1, len(losses[name]) + 1), losses[name], color=color, linewidth=width, label=label)
    axes.set(xlabel="step", ylabel="loss (nats per character)", title="Character model with an M²RNN mixer")
    axes.set_ylim(bottom=0)
    axes.margins(x=0.01)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    pyplot.close(figure)


# --------------------------------------------------------------------------------------------------- command line


def head_counts(text: str) -> tuple[int, ...]:
    """Parse --heads: five counts, each a divisor of the largest."""
    counts = tuple(int(part) for part in text.split(","))
    if len(counts) != 5 or min(counts) < 1 or any(max(counts) % count for count in counts):
        raise argparse.ArgumentTypeError(f"must be five counts that divide the largest, as 1,1,2,2,2; got {text}")
    return counts


def positive(text: str) -> int:
    """Parse a count of at least 1."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return int(text)


def parse_arguments() -> argparse.Namespace:
    """Read the command line; the options of the model default to Config's."""
    default = Config()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--package", default="generated.h100", help="import path of the generated package (%(default)s)")
    add("--backend", choices=[KERNELS, REFERENCE, "both"], default="both", help="what to train with (%(default)s)")
    add("--text", type=Path, default=ROOT / "LICENSE", help="UTF-8 file to learn (the repository's LICENSE)")
    add("--out", type=Path, default=Path("char_lm.png"), help="figure to write (%(default)s)")
    add("--json", type=Path, help="curves to write (--out with the suffix .json)")
    add("--redraw", type=Path, metavar="JSON", help="train nothing: draw --out from the curves of an earlier run")
    add("--device", help="device of torch (cuda if there is one and TRITON_INTERPRET is not 1, else cpu)")
    add("--heads", type=head_counts, default=default.heads, help="of q,k,v,forget,weight (8,8,8,8,8)")
    add("--state-expansion", type=positive, default=default.state_expansion, help="K (%(default)s)")
    add("--head-dim", type=positive, default=default.head_dim, help="V (%(default)s)")
    add("--dtype", choices=DTYPES, default=default.dtype, help="of q, k, v and the matrix products (%(default)s)")
    for name in ("layers", "width", "batch", "seq", "steps", "warmup"):
        add(f"--{name}", type=positive, default=getattr(default, name), help="(%(default)s)")
    add("--learning-rate", type=float, default=default.learning_rate, help="(%(default)s)")
    add("--seed", type=int, default=default.seed, help="of parameters and batches (%(default)s)")
    return parser.parse_args()


def choose_device(name: str | None) -> torch.device:
    """Return the device asked for, else the GPU, unless Triton interprets its kernels on the CPU."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    return torch.device(name or ("cuda" if torch.cuda.is_available() and not interpreted else "cpu"))


def main() -> None:
    """Train what was asked for, then print, write and draw."""
    arguments = parse_arguments()
    if arguments.redraw:
        losses, package = read_curves(arguments.redraw)
        draw_figure(arguments.out, losses, package)
        return
    config = Config(**{name: getattr(arguments, name) for name in Config.__dataclass_fields__})
    device = choose_device(arguments.device)
    product = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    text, vocabulary = read_text(arguments.text)
    curves = arguments.json or arguments.out.with_suffix(".json")
    for place in (curves, arguments.out):  # before the training, whose curves it would not take
        place.parent.mkdir(parents=True, exist_ok=True)
    runs = {}
    for name in (KERNELS, REFERENCE) if arguments.backend == "both" else (arguments.backend,):
        mixer = kernels_mixer(arguments.package) if name == KERNELS else reference_mixer()
        runs[name] = train(config, mixer, text, vocabulary, device)
    package = arguments.package if KERNELS in runs else None
    print(", ".join([product, f"torch {torch.__version__}", *([f"kernels of {package}"] if package else [])]))
    print_table(runs)
    facts = {"package": package, "device": product, "torch": torch.__version__, "config": asdict(config)}
    write_json(curves, runs, facts)
    try:
        draw_figure(arguments.out, {name: run.losses for name, run in runs.items()}, package)
    except ModuleNotFoundError as error:
        print(f"no figure, for want of {error.name}; with it, --redraw draws one from the JSON", file=sys.stderr)


if __name__ == "__main__":
    with reachable():
        main()
