"""Go from a configuration to text: spec, package, a minute of training, a checkpoint's folder, generation.

python examples/generate/run.py                        # minutes; on a CPU through the reference backend
python examples/generate/run.py --prompt "class "      # the folder is there: generates alone
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "hybrid_lm")]
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton

import data  # noqa: E402  (of the example beside this one)
from files import alone, reachable, write_text  # noqa: E402

NAME = "generate_example"
"""Name of the spec and of the package."""
SIZES = {"width": 128, "heads": 8, "rows": 32, "layers": 4, "seq": 128, "batch": 8}
ON_CPU = {"width": 64, "heads": 4, "rows": 16, "layers": 2, "seq": 48, "batch": 16}
SMOKE = {"width": 16, "heads": 2, "rows": 16, "layers": 2, "seq": 8, "batch": 1}
"""Sizes of seconds on a CPU, which show that everything works and nothing else."""


def configuration(width: int, heads: int, rows: int, layers: int) -> dict[str, Any]:
    """Return the config.json of a byte model of M2RNN blocks, with attention in the second layer of every four."""
    recurrent = {
        "sequence_mixer_type": "m2rnn", "k_head_dim": rows, "v_head_dim": 16, "num_q_heads": 1, "num_k_heads": 1,
        "num_v_heads": heads, "num_f_heads": heads, "num_g_heads": heads, "num_weight_heads": heads,
        "use_residual": True, "kernel_size": 4, "activation_function": "silu", "add_bias": False,
        "gradient_clipping": 1.0, "normalization_function": "rmsnorm", "A_init_min": 0.0, "A_init_max": 16.0,
        "dt_init_min": 1e-3, "dt_init_max": 0.1, "dt_init_floor": 1e-4,
    }  # fmt: skip
    attention = {"sequence_mixer_type": "softmax_attention", "num_attention_heads": 4, "num_key_value_heads": 2}
    mlp = {"mlp_type": "MLP", "intermediate_size": 2 * width, "activation_function": "swiglu"}
    return {
        "model_type": "gpt_base", "architectures": ["GPTBaseForCausalLM"], "vocab_size": data.TOKENS,
        "max_position_embeddings": 4096, "hidden_size": width, "num_layers": layers, "position_embedding_type": "nope",
        "normalization_function": "rmsnorm", "initializer_range": 0.02, "tie_word_embeddings": True,
        "sequence_mixer_blocks": [attention if i % 4 == 1 else recurrent for i in range(layers)],
        "mlp_blocks": [mlp] * layers,
    }  # fmt: skip


def m2gen(*arguments: str) -> None:
    """Run a command of m2gen, and show it."""
    print("$ m2gen", *arguments)
    done = subprocess.run([sys.executable, "-m", "m2gen", *arguments], check=False)
    if done.returncode:
        raise SystemExit(done.returncode)


def hf_of(folder: Path, out: Path) -> Any:
    """Build the package that a checkpoint's configuration asks for, and return its module for transformers."""
    spec = out / f"{NAME}.yaml"
    m2gen("spec", "from-config", str(folder), "--name", NAME, "--dtype", "fp32", "--out", str(spec))
    m2gen(
        "build",
        "--spec",
        str(spec),
        "--out",
        str(out),
        "--quiet",
        *([] if torch.cuda.is_available() else ["--no-verify"]),
    )
    sys.path.insert(0, str(out))
    return importlib.import_module(f"{NAME}.hf")


def train(model: Any, sizes: dict[str, int], steps: int | None, seconds: float) -> None:
    """Train on the standard library's sources, for so many steps or seconds."""
    text = data.read([])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    begun, step, loss = time.monotonic(), 0, torch.tensor(0.0)
    while step != steps and (steps is not None or time.monotonic() - begun < seconds):
        inputs, _ = data.batch(text, sizes["batch"], sizes["seq"], seed=0, step=step)
        inputs = inputs.to(model.device)
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1.0, (step + 1) / 20)
        loss = model(input_ids=inputs, labels=inputs).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if step in (1, 10) or step % 50 == 0:
            print(f"step {step}: loss {loss.item():.3f}")
    print(f"trained {step} steps: loss {loss.item():.3f} nats a byte")


def trained_before(folder: Path, asked: dict[str, Any]) -> bool:
    """Whether a folder has a model; one of another configuration, as of other sizes, ends the program."""
    if not (folder / "model.safetensors").exists():
        return False
    found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    # Saving a model names its class, and adds what has a default.
    changed = [name for name in asked if name != "architectures" and found.get(name) != asked[name]]
    if changed:
        raise SystemExit(
            f"{folder} must have a model of these sizes, but has another {', '.join(changed)}; give another --out"
        )
    return True


def save(model: Any, folder: Path) -> None:
    """Save a model as transformers does, its weights last: a folder that has them has a whole model."""
    with tempfile.TemporaryDirectory(prefix=".model.", dir=folder) as name:
        model.save_pretrained(name)
        for path in sorted(Path(name).iterdir(), key=lambda path: path.suffix == ".safetensors"):
            os.replace(path, folder / path.name)


def say(tokens: Tensor) -> str:
    """Return the text of bytes."""
    return bytes(tokens.tolist()).decode("utf-8", errors="replace")


def generate(folder: Path, backend: str, device: str, prompt: str, new: int) -> None:
    """Load the folder through transformers, generate, and print the text and how long a token took."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, backend=backend).to(device)
    ids = torch.tensor([list(prompt.encode())], device=device)
    model.generate(ids, max_new_tokens=2, do_sample=False)  # compiles what is compiled
    begun = time.perf_counter()
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False)
    took = time.perf_counter() - begun  # the tokens are on the host: ``generate`` looks at each
    print(f"--- {backend}: {new / took:,.0f} tokens a second\n{say(out[0])}")


def parsed() -> argparse.Namespace:
    """Return the command line's arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out",
        type=Path,
        help="folder of the spec, package and checkpoint; default: results, with --smoke results/smoke",
    )
    parser.add_argument("--prompt", default="def ")
    parser.add_argument("--tokens", type=int, default=200, help="how many bytes to generate")
    parser.add_argument("--seconds", type=float, help="how long to train; default: 60")
    parser.add_argument("--steps", type=int, help="steps to train, in place of seconds")
    parser.add_argument("--smoke", action="store_true", help="sizes of seconds on a CPU")
    arguments = parser.parse_args()
    for name, least in (("tokens", 1), ("steps", 1), ("seconds", 0)):
        given = getattr(arguments, name)
        if given is not None and not given >= least:
            parser.error(f"--{name} must be at least {least}, got {given}")
    if not arguments.prompt:
        parser.error("--prompt must have a letter, got none")
    arguments.out = arguments.out or HERE / "results" / ("smoke" if arguments.smoke else "")
    return arguments


def go(arguments: argparse.Namespace) -> None:
    """Train a model where the folder has none, and generate."""
    cuda = torch.cuda.is_available()
    sizes = SMOKE if arguments.smoke else SIZES if cuda else ON_CPU
    device, backends = ("cuda", ("kernels", "reference")) if cuda else ("cpu", ("reference",))
    folder: Path = arguments.out / "checkpoint"
    folder.mkdir(exist_ok=True)
    asked = configuration(**{key: value for key, value in sizes.items() if key not in ("seq", "batch")})
    known = trained_before(folder, asked)
    if known:
        ignored = [f"--{name}" for name in ("steps", "seconds") if getattr(arguments, name) is not None]
        said = f" ({', '.join(ignored)} ignored)" if ignored else ""
        print(f"{folder} has a model that was trained before; it is not trained again{said}", file=sys.stderr)
    else:
        write_text(json.dumps(asked, indent=2) + "\n", folder / "config.json")
    hf = hf_of(folder, arguments.out)
    if not known:
        torch.manual_seed(0)
        config = hf.M2RNNConfig.from_pretrained(folder, backend=backends[0])
        model = hf.M2RNNForCausalLM(config).to(device).train()
        train(model, sizes, arguments.steps, 60 if arguments.seconds is None else arguments.seconds)
        save(model, folder)
    for backend in backends:
        generate(folder, backend, device, arguments.prompt, arguments.tokens)


def main() -> None:
    """Do what the command line asks for."""
    arguments = parsed()
    with alone(arguments.out):
        go(arguments)


if __name__ == "__main__":
    with reachable():
        main()
