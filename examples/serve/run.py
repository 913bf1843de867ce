"""Serve a model of M2RNN layers that was not trained, and time it.

m2gen build --spec examples.yaml
python examples/serve/run.py            # tokens a second of 1 to 256 requests, and memory of one; a minute on a GPU
python examples/serve/run.py --check    # first, whether every text is that of the model's own ``generate``
python examples/serve/run.py --smoke    # both at sizes of seconds on a CPU, in Triton's interpreter
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton

from decoder import package_of  # noqa: E402
from engine import Engine, Request, Status  # noqa: E402
from files import reachable, write_text  # noqa: E402

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
LENGTHS = (256, 1024, 4096, 16384, 65536)
"""Tokens of a text, of which the table says how much memory they take."""


@dataclass(frozen=True)
class Sizes:
    """What the model is, and what is asked of it: ``prompt`` and ``new`` are the most tokens of a request."""

    package: str = "generated.examples"
    layer: str = "hybrid_lm"
    width: int = 768
    layers: int = 6
    vocabulary: int = 32768
    batch: Sequence[int] = (1, 2, 4, 8, 16, 32, 64, 128, 256)
    steps: int = 64
    requests: int = 24
    prompt: int = 200
    new: int = 48
    chunk: int = 256


SMOKE = Sizes("generated.tiny", "base", 16, 2, 64, (1, 3), steps=1, requests=5, prompt=9, new=4, chunk=8)
"""Sizes of seconds on a CPU, which show that everything works and nothing else."""


def model_of(package: ModuleType, sizes: Sizes, dtype: str) -> Any:
    """Return a model, drawn anew, whose every mixer is an M2RNN of this layer of the package."""
    points = package.built.LAYERS.get(sizes.layer)
    if not points:
        raise SystemExit(f"--layer must be one of {', '.join(package.built.LAYERS)}, got {sizes.layer}")
    rows, cols, heads = points[0]
    total = max(heads)
    mixer = {
        "sequence_mixer_type": "m2rnn", "k_head_dim": rows, "v_head_dim": cols, "num_q_heads": heads[0],
        "num_k_heads": heads[1], "num_v_heads": heads[2], "num_f_heads": heads[3], "num_weight_heads": heads[4],
        "num_g_heads": total, "use_residual": heads[2] in (1, total), "kernel_size": 4, "activation_function": "silu",
        "add_bias": False, "gradient_clipping": 1.0, "normalization_function": "rmsnorm",
    }  # fmt: skip
    mlp = {"mlp_type": "MLP", "intermediate_size": 4 * sizes.width, "activation_function": "swiglu"}
    hf = importlib.import_module(f"{package.__name__}.hf")
    torch.manual_seed(0)
    config = hf.M2RNNConfig(
        vocab_size=sizes.vocabulary, hidden_size=sizes.width, num_layers=sizes.layers, init_method="normal",
        initializer_range=sizes.width**-0.5, sequence_mixer_blocks=[mixer] * sizes.layers,
        mlp_blocks=[mlp] * sizes.layers,
    )  # fmt: skip
    model = hf.M2RNNForCausalLM(config).eval()
    return model.to("cuda" if torch.cuda.is_available() else "cpu", DTYPES[dtype])


def drawn(draw: random.Random, sizes: Sizes, prompt: int, new: int) -> Request:
    """Return a request with a prompt of so many tokens."""
    return Request([draw.randrange(sizes.vocabulary) for _ in range(prompt)], new)


def serve(engine: Engine, requests: list[Request], draw: random.Random) -> Counter[str]:
    """Serve requests that arrive, are cancelled, evicted and resumed at random; return how often each happened."""
    coming, happened = list(requests), Counter(evicted=0, resumed=0, cancelled=0)
    while any(request.status not in (Status.DONE, Status.CANCELLED) for request in requests):
        for _ in range(min(len(coming), draw.randint(0, 3))):
            engine.add(coming.pop(0))
        out = [request for request in requests if request.status is Status.EVICTED]
        if out and draw.random() < 0.3:
            engine.add(draw.choice(out))
            happened["resumed"] += 1
        if engine.running and draw.random() < 0.2:
            engine.evict(draw.choice(engine.running))
            happened["evicted"] += 1
        there = [request for request in requests if request not in coming]
        if there and draw.random() < 0.05:
            victim = draw.choice(there)
            happened["cancelled"] += victim.status not in (Status.DONE, Status.CANCELLED)
            engine.cancel(victim)
        engine.step()
    return happened


def alone(model: Any, request: Request) -> list[int]:
    """Return what the model itself generates, greedily, after one prompt."""
    ids = torch.tensor([request.prompt], device=model.device)
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=request.new, do_sample=False)
    return [int(token) for token in out[0, len(request.prompt) :]]


def check(package: ModuleType, sizes: Sizes) -> dict[str, Any]:
    """Compare texts of a seeded schedule with those that the model generates one by one, in float32.

    In bfloat16 a product's last bits change with the number of its rows, by which nearly equal logits change places.
    """
    model, draw = model_of(package, sizes, "fp32"), random.Random(0)
    requests = [
        drawn(draw, sizes, draw.randint(1, sizes.prompt), draw.randint(1, sizes.new)) for _ in range(sizes.requests)
    ]
    slots = max(2, sizes.requests // 3)
    happened = serve(Engine(package, model, slots, sizes.chunk), requests, draw)
    texts = [alone(model, request) for request in requests]
    equal = [  # one that was cancelled has as much of its text as it came to
        request.text == (text if request.status is Status.DONE else text[: len(request.text)])
        for request, text in zip(requests, texts, strict=True)
    ]
    tokens = [token for request in requests for token in request.text]
    return {
        "requests": len(requests), "slots": slots, "tokens": len(tokens), "different": len(set(tokens)), **happened,
        "equal": sum(equal),
    }  # fmt: skip


def timed(engine: Engine, sizes: Sizes, batch: int) -> float:
    """Return the milliseconds of a step that decodes so many requests, all of the engine's work included."""
    draw = random.Random(batch)
    prompt = min(sizes.prompt, 16)
    prefill = -(-batch * prompt // engine.chunk)
    requests = [drawn(draw, sizes, prompt, prefill + sizes.steps + 8) for _ in range(batch)]
    for request in requests:
        engine.add(request)
    while not all(request.text for request in requests):
        engine.step()
    for _ in range(3):  # the graph of this size is captured, and everything is warm
        engine.step()
    begun = time.perf_counter()
    for _ in range(sizes.steps):
        engine.step()
    took = time.perf_counter() - begun  # the tokens are on the host
    for request in requests:
        engine.cancel(request)
    return 1e3 * took / sizes.steps


def measure(package: ModuleType, sizes: Sizes, dtype: str) -> dict[str, Any]:
    """Time batches of every size, and compute the bytes of a request and of keys and values in place of its states."""
    engine = Engine(package, model_of(package, sizes, dtype), max(sizes.batch), sizes.chunk)
    steps = {}
    for batch in sizes.batch:
        steps[batch] = timed(engine, sizes, batch)
        print(f"{batch} requests: {steps[batch]:.2f} ms a step", file=sys.stderr)
    token = 2 * sizes.layers * sizes.width * DTYPES[dtype].itemsize
    return {
        "milliseconds": steps, "state_bytes": engine.state_bytes,
        "attention_bytes": {length: token * length for length in LENGTHS},
    }  # fmt: skip


def report(results: dict[str, Any]) -> str:
    """Return all results as text."""
    checked, states = results["check"], results["state_bytes"] / 1e6
    model = f"{results['layers']} layers of {results['package']} {results['layer']}, width {results['width']}"
    rows = [f"{results['device']}, torch {results['torch']}, {results['dtype']}, {model}", ""]
    if checked is not None:
        rows += [
            "{equal} of {requests} texts are those of one-by-one generation, in fp32: {tokens} tokens, {different} "
            "different ones; {evicted} evicted, {resumed} resumed, {cancelled} cancelled".format(**checked),
            "",
        ]
    rows += ["| requests | tokens/s | ms a step |", "| --- " * 3 + "|"]
    rows += [f"| {n} | {1e3 * n / took:,.0f} | {took:.2f} |" for n, took in results["milliseconds"].items()]
    rows += ["", "| tokens of a request | MB of states | MB of keys and values, computed |", "| --- " * 3 + "|"]
    rows += [f"| {n} | {states:.2f} | {size / 1e6:,.2f} |" for n, size in results["attention_bytes"].items()]
    return "\n".join(rows) + "\n"


def count(text: str) -> int:
    """Parse a count of at least 1."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return int(text)


@reachable()
def main() -> None:
    """Do what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for size in fields(Sizes):
        kind = str if isinstance(size.default, str) else count
        several = {"nargs": "+"} if size.name == "batch" else {}
        parser.add_argument(f"--{size.name}", help=f"default: {size.default}", type=kind, **several)
    parser.add_argument("--dtype", choices=DTYPES, help="of what is timed; default: bf16, and fp32 on a CPU")
    parser.add_argument("--check", action="store_true", help="compare texts with one-by-one generation first, in fp32")
    parser.add_argument("--smoke", action="store_true", help="check and time at sizes of seconds on a CPU")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of serve.md and serve.json")
    parser.add_argument("--json", action="store_true", help="print JSON in place of tables")
    arguments = parser.parse_args()
    given = {size.name: getattr(arguments, size.name) for size in fields(Sizes)}
    sizes = replace(
        SMOKE if arguments.smoke else Sizes(), **{name: value for name, value in given.items() if value is not None}
    )
    cuda, package = torch.cuda.is_available(), package_of(sizes.package)
    dtype = arguments.dtype or ("bf16" if cuda else "fp32")
    device = torch.cuda.get_device_name() if cuda else "CPU, interpreted"
    arguments.out.mkdir(parents=True, exist_ok=True)  # before minutes of work whose results it would not take
    results: dict[str, Any] = {"device": device, "torch": torch.__version__, "dtype": dtype, **asdict(sizes)}
    results["check"] = checked = check(package, sizes) if arguments.check or arguments.smoke else None
    results |= measure(package, sizes, dtype)
    text, data = report(results), json.dumps(results, indent=2) + "\n"
    write_text(text, arguments.out / "serve.md")
    write_text(data, arguments.out / "serve.json")
    print(data if arguments.json else text, end="")
    if checked is not None and checked["equal"] < checked["requests"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
