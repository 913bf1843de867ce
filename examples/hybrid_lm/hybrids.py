"""Train hybrids of attention, M2RNN and Gated DeltaNet on the same bytes, and show what each makes of held-out files.

    m2gen build --spec hybrids.yaml
    python examples/hybrid_lm/hybrids.py --out OUT --minutes 9     # again and again, until nothing is left to run
    python examples/hybrid_lm/hybrids.py --report OUT/hybrids.json --readme examples/hybrid_lm/README.md

Finished runs lie in --out and are not run again; a run that the time, or a signal, has ended goes on from its
checkpoint. Runs in --known, the hybrids.json of another machine, are finished as well. After each run, hybrids.json,
hybrids.md and the figures (with matplotlib) are those of all runs so far.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton

import corpus  # noqa: E402
import report  # noqa: E402
from files import alone, reachable, write_json  # noqa: E402
from finished import Known, collected, read  # noqa: E402
from plan import Plan, check_equal, load_plan  # noqa: E402
from runs import Clock, Runner  # noqa: E402
from settings import changes_of  # noqa: E402

SMOKE = {
    "package": "generated.tiny", "dtype": "fp32", "seq": 4, "batch": 1, "steps": 4, "warmup": 1, "evaluate_every": 2,
    "save_every": 2, "text": {"limit": 60000, "validation": 4, "roots": [str(HERE)]},
    "validation": {"curve": 4, "final": 8},
    "variants": {"with M²RNN": ["m2rnn", "attention"], "with Gated DeltaNet": ["gated_deltanet", "attention"]},
    "compare": [["with M²RNN", "with Gated DeltaNet"]],
    "sizes": {
        "tiny": {
            "layer": "base", "width": 64, "layers": 2, "heads": 2, "block": 50000, "seeds": [0, 1],
            "delta": {"gated_deltanet": {"heads": 1, "rows": 8, "columns": 64}},
        },
    },
}  # fmt: skip
"""Runs of seconds on a CPU, which show that everything works and nothing else."""


def run_all(plan: Plan, out: Path, clock: Clock, known: Known) -> int:
    """Do the runs that are not finished, while the time lasts; return how many are left."""
    for name in ("runs", "checkpoints"):
        (out / name).mkdir(exist_ok=True)
    check_equal(plan)
    text = corpus.kept(plan.text, out / "text.pt")
    print(f"text: {text.facts}", file=sys.stderr)
    runner, results = Runner(text, out, clock, known), []
    wanted = plan.runs()
    for run in wanted:
        result = runner.finished(run) or (None if clock.over else runner.train(run))
        if result is not None:
            results.append(result)
            write_json(collected(plan, results), out / "hybrids.json")
    return len(wanted) - len(results)


def only_report(place: Path, out: Path, readme: Path | None) -> None:
    """Write table and figures of the runs in a file; one of another form ends the program."""
    try:
        data = json.loads(place.read_text(encoding="utf-8"))
        report.table(data)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise SystemExit(f"{place} must be a hybrids.json of finished runs, got {error!r}") from None
    if not readme:
        out.mkdir(parents=True, exist_ok=True)
    report.write(data, out, readme)


def main() -> None:
    """Do what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=HERE / "hybrids.yaml")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a value; YAML")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of runs, checkpoints and results")
    parser.add_argument("--known", type=Path, metavar="JSON", help="hybrids.json whose runs are finished, too")
    parser.add_argument("--minutes", type=float, help="stop after so long, in the middle of a run if need be")
    parser.add_argument("--smoke", action="store_true", help="sizes of seconds on a CPU, in Triton's interpreter")
    parser.add_argument("--report", type=Path, metavar="JSON", help="only write table and figures of finished runs")
    parser.add_argument("--readme", type=Path, help="with --report: put the table there, and the figures beside it")
    arguments = parser.parse_args()
    if arguments.readme and not arguments.report:
        parser.error("--readme must be given with --report, got it alone")
    if arguments.report:
        only_report(arguments.report, arguments.out, arguments.readme)
        return
    changes = dict(SMOKE) if arguments.smoke else {}
    changes |= changes_of(arguments.set)
    clock = Clock(arguments.minutes)
    signal.signal(signal.SIGTERM, clock.stop)
    plan = load_plan(arguments.config, changes)
    known = read(arguments.known, plan) if arguments.known else Known()
    with alone(arguments.out):
        left = run_all(plan, arguments.out, clock, known)
        place = arguments.out / "hybrids.json"
        if place.is_file():
            report.write(json.loads(place.read_text(encoding="utf-8")), arguments.out)
    if left:
        print(f"{left} runs are left; the same command goes on", file=sys.stderr)


if __name__ == "__main__":
    with reachable():
        main()
