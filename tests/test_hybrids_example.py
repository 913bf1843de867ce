"""The comparison of hybrids: Gated DeltaNet in chunks, the text, the statistics, and runs that are killed and go on."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from itertools import combinations
from pathlib import Path
from statistics import fmean, stdev
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from scipy import stats
from support import ROOT
from torch import Tensor
from torch.nn import functional as F

from m2gen.kernels.compile import load_module
from tools.gated_deltanet import Plain

EXAMPLES = ROOT / "examples"
LOCAL = (
    "example_hybrids", "decoder", "gated_delta", "data", "model", "loop", "compare", "corpus", "plan", "runs", "report",
    "captured", "finished", "files", "pictures", "settings",
)  # fmt: skip
"""The command, and the modules that it finds beside it."""


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return the command's module; those beside it are found in ``sys.modules``."""
    monkeypatch.setattr(sys, "path", [str(EXAMPLES), str(EXAMPLES / "hybrid_lm"), str(ROOT), *sys.path])
    for name in LOCAL:
        monkeypatch.delitem(sys.modules, name, raising=False)
    before = signal.getsignal(signal.SIGTERM)
    yield load_module(EXAMPLES / "hybrid_lm" / "hybrids.py", "example_hybrids")
    signal.signal(signal.SIGTERM, before)
    for name in LOCAL:
        sys.modules.pop(name, None)


def rule_by_hand(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor) -> Tensor:
    """Return the gated delta rule's results, one token after the other."""
    state = q.new_zeros(*q.shape[::2], q.shape[3], v.shape[3])
    results = []
    for t in range(q.shape[1]):
        key = k[:, t, :, :, None]
        erased = state - beta[:, t, :, None, None] * key @ (key.mT @ state)
        written = beta[:, t, :, None, None] * key @ v[:, t, :, None, :]
        state = log_decay[:, t, :, None, None].exp() * erased + written
        results.append((q[:, t, :, None, :] @ state).squeeze(-2))
    return torch.stack(results, 1)


def operands(length: int, dtype: torch.dtype = torch.float64, heads: int = 3) -> list[Tensor]:
    """Return random q, k, v, log_decay and beta of two sequences, with unit keys."""
    torch.manual_seed(length)
    q, k = torch.randn(2, 2, length, heads, 8, dtype=dtype)
    v = torch.randn(2, length, heads, 5, dtype=dtype)
    decay, beta = torch.rand(2, 2, length, heads, dtype=dtype)
    return [x.requires_grad_() for x in (q, F.normalize(k, dim=-1), v, -0.4 * decay, beta)]


@pytest.mark.parametrize(("length", "chunk"), [(1, 8), (7, 8), (8, 8), (67, 16), (201, 64), (33, 1)])
def test_chunks_are_the_recurrence(example, length, chunk) -> None:
    """Results and every gradient are those of the recurrence in float64, whatever the length."""
    given = operands(length)
    results = [call(*given) for call in (lambda *x: delta().gated_delta_rule(*x, chunk=chunk), rule_by_hand)]
    dy = torch.randn_like(results[0])
    gradients = [torch.autograd.grad(y, given, dy) for y in results]
    assert torch.allclose(*results, rtol=0, atol=1e-12)
    for ours, expected in zip(*gradients, strict=True):
        assert torch.allclose(ours, expected, rtol=0, atol=1e-11)


def delta() -> Any:
    """Return the module of the gated delta rule."""
    return sys.modules["gated_delta"]


def test_equal_keys_stay_exact(example) -> None:
    """One key again and again, with beta 1 and no decay, is where powers of A would lose every digit of float32."""
    q, k, v, log_decay, beta = (x.detach().float() for x in operands(150))
    given = (q, k[:, :1].expand_as(k), v, 0 * log_decay, torch.ones_like(beta))
    expected = rule_by_hand(*(x.double() for x in given))
    assert (delta().gated_delta_rule(*given).double() - expected).abs().max() < 1e-5 * expected.abs().max()


def test_narrow_operands(example) -> None:
    """With bfloat16 products results and gradients stay as near as its 8 bits allow."""
    given = operands(130)
    expected = rule_by_hand(*given)
    dy = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, given, dy)
    narrow = [x.detach().to(torch.bfloat16 if i < 3 else torch.float32).requires_grad_() for i, x in enumerate(given)]
    y = delta().gated_delta_rule(*narrow)
    assert y.dtype == torch.bfloat16
    found = torch.autograd.grad(y, narrow, dy.to(y.dtype))
    for ours, exact in zip((y, *found), (expected, *wanted), strict=True):
        assert ours.isfinite().all()
        assert (ours.double() - exact).norm() < 2**-5 * exact.norm()


@pytest.mark.parametrize("heads", [1, 3])
def test_the_layer_is_that_of_flash_linear_attention(example, heads) -> None:
    """Results and gradients are those of the package's layer, written out by token, with its parameters' names."""
    torch.manual_seed(heads)
    layer = delta().GatedDelta(12, heads, 4, 6).double()
    parameters = dict(layer.named_parameters())
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.add_(0.1 * torch.randn_like(parameter))
    plain = Plain(SimpleNamespace(head_k_dim=4, head_v_dim=6, o_norm=SimpleNamespace(eps=layer.eps)))
    x = torch.randn(2, 71, 12, dtype=torch.float64, requires_grad=True)
    results = (layer(x), plain(parameters, x))
    assert torch.allclose(*results, rtol=0, atol=1e-11)
    dy = torch.randn_like(x)
    wanted = [x, *parameters.values()]
    gradients = [torch.autograd.grad(y, wanted, dy) for y in results]
    for ours, expected in zip(*gradients, strict=True):
        assert torch.allclose(ours, expected, rtol=1e-9, atol=1e-10)


def test_initial_gates_are_in_their_ranges(example) -> None:
    """A and the step of the decay are drawn as flash-linear-attention draws them."""
    layer = delta().GatedDelta(8, 1000, 1, 1)
    assert 0 < layer.A_log.exp().min() < 1 < 15 < layer.A_log.exp().max() < 16
    steps = F.softplus(layer.dt_bias)
    assert 9e-4 < steps.min() < 2e-3 < 0.09 < steps.max() < 0.11
    assert layer.state_size == 1000


def test_text_is_split_by_file(example, tmp_path) -> None:
    """Every content is there once, none of the validation in the training text, and twice the same comes out."""
    corpus, random = sys.modules["corpus"], torch.Generator().manual_seed(0)
    for i in range(60):
        numbers = torch.randint(10**9, (40,), generator=random).tolist()
        (tmp_path / f"m{i}.py").write_text("".join(f"a_name_{number} = a_function({number})\n" for number in numbers))
    (tmp_path / "copy.py").write_text((tmp_path / "m0.py").read_text().replace(" = ", "   =  "))
    (tmp_path / "zeros.py").write_bytes(bytes(1000))
    (tmp_path / "short.py").write_text("x = 1\n")
    (tmp_path / "notes.md").write_text("x = 1\n" * 100)
    choice = corpus.Choice(1 << 20, 5, (str(tmp_path),))
    text = corpus.kept(choice, tmp_path / "text.pt")
    facts = text.facts
    assert (facts.train_files + facts.validation_files, facts.dropped) == (60, 0)
    assert facts.validation_files > 3
    train, validation = (bytes(part.tolist()).split() for part in (text.train, text.validation))
    assert (len(train), len(validation)) == (120 * facts.train_files, 120 * facts.validation_files)
    assert set(train) & set(validation) == {b"="}
    (tmp_path / "m1.py").unlink()
    assert corpus.kept(choice, tmp_path / "text.pt").facts == facts  # what was gathered stays
    with pytest.raises(SystemExit, match=r"text.pt must be of Choice\(limit=9, .*give another --out"):
        corpus.kept(corpus.Choice(9, 5, choice.roots), tmp_path / "text.pt")
    saved = torch.load(tmp_path / "text.pt", weights_only=True)
    del saved["choice"]  # as files of before
    torch.save(saved, tmp_path / "before.pt")
    assert corpus.kept(corpus.Choice(9, 5, choice.roots), tmp_path / "before.pt").facts == facts
    assert corpus.gather(choice).facts != facts
    less = corpus.gather(corpus.Choice(50_000, 5, (str(tmp_path),))).facts
    assert less.train_bytes + less.validation_bytes <= 50_000


def test_copies_are_dropped_from_the_validation(example, tmp_path) -> None:
    """A file most of whose lines are in the training text tells nothing."""
    corpus = sys.modules["corpus"]
    body = "".join(f"a_rather_long_name_{i} = {i}\n" for i in range(50))
    for i in range(30):
        (tmp_path / f"m{i}.py").write_text(f"{body}own_line_of_this_file = {i}\n")
    with pytest.raises(SystemExit, match="must have files to train on and to validate with"):
        corpus.gather(corpus.Choice(1 << 20, 5, (str(tmp_path),)))


def test_batches_and_windows(example) -> None:
    """Batches depend on seed and step alone; windows cover the text evenly, each byte followed by the next."""
    corpus, text = sys.modules["corpus"], torch.arange(103, dtype=torch.uint8)
    one, other = corpus.batch(text, 4, 5, 3, 7), corpus.batch(text, 4, 5, 3, 7)
    assert torch.equal(one[0], other[0])
    assert torch.equal(one[0] + 1, one[1])
    assert not torch.equal(one[0], corpus.batch(text, 4, 5, 3, 8)[0])
    rows = [x for x, following in corpus.windows(text, 1000, 3, 10) if torch.equal(x + 1, following)]
    assert torch.equal(torch.cat(rows).flatten(), torch.arange(100))
    assert [x[:, 0].tolist() for x, _ in corpus.windows(text, 30, 3, 10)] == [[0, 30, 60]]


def test_students_t(example) -> None:
    """Quantiles and tails are those of tables."""
    report = sys.modules["report"]
    for degrees, expected in ((1, 12.7062), (2, 4.3027), (4, 2.7764), (30, 2.0423)):
        assert report.quantile(degrees) == pytest.approx(expected, abs=1e-4)
    assert report.tail(0.0, 2) == pytest.approx(0.5)
    found = report.paired([1.1, 2.2, 3.0], [1.0, 2.0, 2.7])  # 0.1, 0.2, 0.3
    assert (found.mean, found.half) == (pytest.approx(0.2), pytest.approx(4.3027 * 0.1 / math.sqrt(3), abs=1e-4))
    assert found.chance == pytest.approx(1 - 12**0.5 / 14**0.5, abs=1e-5)
    assert report.paired([1.0], [2.0]).half == math.inf
    assert report.paired([1.1, 2.2], [1.1, 2.2]).chance == pytest.approx(1)  # equal: as likely as can be
    assert report.paired([1.5, 2.5], [1.0, 2.0]).chance == 0


@pytest.mark.parametrize("count", [1, 2, 4, 6])
def test_chances_are_corrected_for_their_number(example, count) -> None:
    """Holm's are those of all tests of intersections of hypotheses, each by Bonferroni, of which the largest counts."""
    holm = sys.modules["report"].holm
    for row in torch.rand(20, count, generator=torch.Generator().manual_seed(count)).square().tolist():
        expected = [
            max(
                min(1.0, size * min(row[j] for j in some))
                for size in range(1, count + 1)
                for some in combinations(range(count), size)
                if i in some
            )
            for i in range(count)
        ]
        assert holm(row) == pytest.approx(expected)
    assert holm([]) == []
    assert holm([math.nan, 0.01, 0.02]) == pytest.approx([math.nan, 0.03, 0.04], nan_ok=True)


def test_a_difference_counts_beside_all_others(example) -> None:
    """One that would count alone does not among four, a large one does, and one seed is no test."""
    report = sys.modules["report"]
    measured = json.loads((ROOT / "docs" / "data" / "hybrids_rate_1e-3_h200.json").read_text(encoding="utf-8"))

    def rows(data: dict[str, Any]) -> list[list[str]]:
        lines = [line.strip("|").split("|") for line in report.table(data).splitlines() if " less " in line]
        return [[cell.strip() for cell in cells[-4:]] for cells in lines]

    assert [row[1:] for row in rows(measured)] == [
        ["0.177", "0.415", "no"], ["0.138", "0.415", "no"], ["0.901", "0.901", "no"], ["0.032", "0.128", "no"],
        ["", "", "one seed"],
    ]  # fmt: skip
    alone = {**measured, "compare": [measured["compare"][-1]]}
    assert rows(alone) == [["+0.2880 ± 0.2275", "0.032", "0.032", "yes"]]
    for run in measured["runs"]:  # the same in every seed
        run["final"] = {"all M²RNN": 1.0, "all Gated DeltaNet": 0.9}.get(run["variant"], run["final"]) + run[
            "seed"
        ] / 1e4
    assert rows(measured)[3][-1] == "yes"


def smoke(example: Any, monkeypatch: pytest.MonkeyPatch, out: Path, *arguments: str) -> None:
    """Run the command in this process."""
    monkeypatch.setattr(sys, "argv", ["hybrids.py", "--smoke", "--out", str(out), *arguments])
    example.main()


def test_killed_runs_go_on(example, monkeypatch, tmp_path, capsys) -> None:
    """Killed after a checkpoint, or out of time between two, the command ends with the results of one in one piece."""
    faster = ("--set", "variants={with Gated DeltaNet: [gated_deltanet], with M²RNN: [attention]}")
    smoke(example, monkeypatch, tmp_path / "whole", *faster)
    table = capsys.readouterr().out
    trainer, parts = sys.modules["captured"].CapturedTrainer, tmp_path / "parts"
    step, places = trainer.step, []

    def dies(self: Any, *rows: Any) -> Any:
        if self.done == 3:
            raise KeyboardInterrupt
        return step(self, *rows)

    monkeypatch.setattr(trainer, "step", dies)
    with pytest.raises(KeyboardInterrupt):
        smoke(example, monkeypatch, parts, *faster)
    (place,) = (parts / "checkpoints").iterdir()
    assert torch.load(place, weights_only=True)["trainer"]["done"] == 2
    assert list((parts / "runs").iterdir()) == []

    def out_of_time(self: Any, *rows: Any) -> Any:
        if self.done == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *rows)

    monkeypatch.setattr(trainer, "step", out_of_time)
    smoke(example, monkeypatch, parts, *faster)
    assert "4 runs are left; the same command goes on" in capsys.readouterr().err
    assert torch.load(place, weights_only=True)["trainer"]["done"] == 3
    monkeypatch.setattr(trainer, "step", step)
    smoke(example, monkeypatch, parts, *faster, "--minutes", "0")
    assert list((parts / "runs").iterdir()) == []
    smoke(example, monkeypatch, parts, *faster)
    said = capsys.readouterr()
    assert "going on at step 3" in said.err
    for folder in ("whole", "parts"):
        data = json.loads((tmp_path / folder / "hybrids.json").read_text(encoding="utf-8"))
        places.append([(run["final"], [(x, *rest) for x, _, *rest in run["curve"]]) for run in data["runs"]])
        assert list((tmp_path / folder / "checkpoints").iterdir()) == []
    assert places[0] == places[1]
    assert len(places[0]) == 4
    assert [line.split(" | ")[:7] for line in table.splitlines()[2:]][:4] == [
        line.split(" | ")[:7] for line in said.out.splitlines()[2:]
    ][:4]
    smoke(example, monkeypatch, parts, *faster)  # nothing is run again
    assert "step" not in capsys.readouterr().err
    with pytest.raises(SystemExit, match="must be of this plan, but has another plan; give another --out"):
        smoke(example, monkeypatch, parts, *faster, "--set", "learning_rate=1")


def test_runs_of_another_machine_are_finished(example, monkeypatch, tmp_path, capsys) -> None:
    """With a file of all results nothing is trained; other facts, and a file of another form, end the program."""
    faster = ("--set", "variants={with Gated DeltaNet: [gated_deltanet], with M²RNN: [attention]}")
    smoke(example, monkeypatch, tmp_path / "first", *faster)
    known, trained = tmp_path / "first" / "hybrids.json", []
    monkeypatch.setattr(sys.modules["runs"].Runner, "train", lambda self, run: trained.append(run))

    def going_on(name: str, place: Path, *arguments: str) -> Path:
        smoke(example, monkeypatch, tmp_path / name, "--known", str(place), *arguments)
        return tmp_path / name

    second = going_on("second", known, *faster)
    assert trained == []
    assert len(list((second / "runs").iterdir())) == 4
    for place in ("hybrids.json", *(f"runs/{path.name}" for path in (second / "runs").iterdir())):
        assert json.loads((second / place).read_text()) == json.loads((tmp_path / "first" / place).read_text()), place
    older = json.loads(known.read_text(encoding="utf-8"))
    for run in older["runs"]:
        del run["mixers"]
    (tmp_path / "older.json").write_text(json.dumps(older), encoding="utf-8")
    assert (going_on("third", tmp_path / "older.json", *faster) / "hybrids.json").read_text() == known.read_text()
    assert trained == []

    seeds = yaml.safe_dump({"tiny": {**example.SMOKE["sizes"]["tiny"], "seeds": [1, 2]}})
    going_on("seeds", known, *faster, "--set", f"sizes={seeds}")
    assert [run.seed for run in trained] == [2, 2]
    others = {
        "plan": ("--set", "learning_rate=1"),
        "text": ("--set", "text={limit: 50000, validation: 4, roots: [" + str(EXAMPLES / "hybrid_lm") + "]}"),
        "mixers": ("--set", "variants={with Gated DeltaNet: [attention, gated_deltanet], with M²RNN: [attention]}"),
    }
    for name, changed in others.items():
        refusal = rf"first/hybrids.json must be of this plan, but has another [a-z, ]*{name}.*; give another --known"
        with pytest.raises(SystemExit, match=refusal):
            going_on(name, known, *faster, *changed)
        assert list((tmp_path / name / "runs").iterdir()) == []
    for text in ("no JSON", "[]", "{}", '{"runs": 1}', json.dumps({**older, "runs": [{"size": "tiny"}]})):
        (tmp_path / "bad.json").write_text(text, encoding="utf-8")
        with pytest.raises(SystemExit, match=r"bad.json must be a hybrids.json of finished runs, got"):
            going_on("bad", tmp_path / "bad.json")


def test_smoke_on_kernels_and_the_readme(example, monkeypatch, tmp_path, capsys) -> None:
    """A process of its own trains the hybrids on kernels; the table gets into a readme, with figures beside it."""
    command = [sys.executable, str(EXAMPLES / "hybrid_lm" / "hybrids.py")]
    options = ["--smoke", "--out", str(tmp_path), "--set", "steps=2", "--set", "seq=2"]
    subprocess.run([*command, *options], check=True, stdout=subprocess.DEVNULL)
    data = json.loads((tmp_path / "hybrids.json").read_text(encoding="utf-8"))
    assert [(run["variant"], run["seed"]) for run in data["runs"]] == [
        (variant, seed) for seed in (0, 1) for variant in ("with M²RNN", "with Gated DeltaNet")
    ]
    assert data["runs"][0]["states"] == {"m2rnn": 2 * 16 * 16, "attention": 2 * 64 * 2}
    assert all(math.isfinite(run["final"]) for run in data["runs"])
    assert 0.99 < data["runs"][0]["parameters"] / data["runs"][1]["parameters"] < 1.01
    readme = tmp_path / "page" / "README.md"
    readme.parent.mkdir()
    readme.write_text("# Page\n\n<!-- hybrids: begin -->\nold\n<!-- hybrids: end -->\nafter\n", encoding="utf-8")
    monkeypatch.setattr(
        sys, "argv", ["hybrids.py", "--report", str(tmp_path / "hybrids.json"), "--readme", str(readme)]
    )
    for _ in range(2):
        example.main()
    page = readme.read_text(encoding="utf-8")
    assert "old" not in page
    assert '<img alt="validation' in page  # as the site looks for pictures
    assert page.endswith("<!-- hybrids: end -->\nafter\n")
    assert page.count("| tiny | with M²RNN | 0, 1 |") == 1
    assert page.count("with M²RNN less with Gated DeltaNet | 2 |") == 1
    for nats in (1e3, math.nan):  # diverged
        for run in data["runs"]:
            run["final"], run["curve"][0][3] = nats, nats
        sys.modules["report"].write(data, tmp_path / "page")
        assert "| tiny | with M²RNN less with Gated DeltaNet | 2 | +nan | nan | nan | no |" in capsys.readouterr().out
    for name in ("hybrids.svg", "hybrids-dark.svg"):
        assert (readme.parent / name).read_text(encoding="utf-8").startswith("<?xml")
    readme.write_text("nothing", encoding="utf-8")
    with pytest.raises(SystemExit, match="must have <!-- hybrids: begin -->"):
        example.main()
    for text in ("no JSON", "[]", "{}", json.dumps({**data, "runs": []}), json.dumps({**data, "runs": [{}]})):
        (tmp_path / "hybrids.json").write_text(text, encoding="utf-8")
        with pytest.raises(SystemExit, match=r"hybrids.json must be a hybrids.json of finished runs, got"):
            example.main()
    monkeypatch.setattr(sys, "argv", ["hybrids.py", "--readme", str(readme)])
    with pytest.raises(SystemExit, match="2"):
        example.main()
    assert "--readme must be given with --report, got it alone" in capsys.readouterr().err


def test_the_pages_have_what_was_measured(example) -> None:
    """The example's page has the table of the committed runs, and the page of claims their means."""
    report, data = sys.modules["report"], ROOT / "docs" / "data"

    def runs(name: str) -> dict[str, Any]:
        return dict(json.loads((data / f"{name}.json").read_text(encoding="utf-8")))

    measured = runs("hybrids_h200")
    assert report.table(measured) in (EXAMPLES / "hybrid_lm" / "README.md").read_text(encoding="utf-8")
    claims = (ROOT / "docs" / "claims.md").read_text(encoding="utf-8")

    def perplexities(found: dict[str, Any], size: str, variant: str) -> list[float]:
        return [report.words(run["final"]) for run in report.runs_of(found, size, variant)]

    for variant in measured["variants"]:
        row = next(line for line in claims.splitlines() if line.startswith(f"| {variant} | "))
        large = perplexities(measured, "44M", variant)
        cells = [report.spread(perplexities(measured, "11M", variant), 4), report.spread(large, 4) if large else ""]
        assert [cell.strip() for cell in row.split("|")[2:4]] == cells
    pair = measured["compare"][0]
    for rate, name, size in (
        ("3e-4", "hybrids_rate_3e-4_h200", "11M"),
        ("1e-3", "hybrids_rate_1e-3_h200", "11M"),
        ("3e-3", "hybrids_h200", "11M"),
        ("3e-3", "hybrids_rate_3e-3_h200", "11M"),
        ("1e-3", "hybrids_rate_1e-3_h200", "44M"),
        ("3e-3", "hybrids_h200", "44M"),
    ):
        found = runs(name)
        columns = (perplexities(found, size, variant) for variant in (*pair, "attention"))
        means = " | ".join(f"{fmean(column):.4f}" if column else "" for column in columns)
        seeds = ", ".join(str(run["seed"]) for run in report.runs_of(found, size, pair[0]))
        assert f"| {rate} | {found['plan']['steps']} | {size} | {means} | {seeds} |".replace("  ", " ") in claims
        assert found["plan"]["learning_rate"] == float(rate)


def test_the_page_of_claims_has_the_differences(example) -> None:
    """Means and 95 % intervals of pairs of one seed, at both rates, by the page's own statistics."""
    report, data = sys.modules["report"], ROOT / "docs" / "data"
    claims = " ".join((ROOT / "docs" / "claims.md").read_text(encoding="utf-8").split())
    ours, theirs, alone = "attention + M²RNN", "attention + Gated DeltaNet", "attention"
    for name, one, other, said in (
        ("hybrids_h200", ours, theirs, "{:.3f} ± {:.3f} lower"),
        ("hybrids_h200", ours, f"{theirs} of smaller heads", "{:+.3f} ± {:.3f}"),
        ("hybrids_h200", "attention + one of each", theirs, "{:+.3f} ± {:.3f}"),
        ("hybrids_h200", ours, alone, "by {:.3f} ± {:.3f}"),
        ("hybrids_h200", theirs, alone, "by {:.3f} ± {:.3f}"),
        ("hybrids_rate_1e-3_h200", ours, alone, "by {:.3f} ± {:.3f}"),
        ("hybrids_rate_1e-3_h200", ours, theirs, "by {:.3f} ± {:.3f}"),
        ("hybrids_rate_3e-4_h200", ours, theirs, "{:.2f} ± {:.2f}"),
        ("hybrids_h200", "all M²RNN", "all Gated DeltaNet", "{:.2f} ± {:.2f}"),
        ("hybrids_rate_1e-3_h200", "all M²RNN", "all Gated DeltaNet", "{:.2f} ± {:.2f}"),
    ):
        found = json.loads((data / f"{name}.json").read_text(encoding="utf-8"))
        first, second = (
            {run["seed"]: report.words(run["final"]) for run in report.runs_of(found, "11M", variant)}
            for variant in (one, other)
        )
        apart = [first[seed] - second[seed] for seed in first]
        interval = stats.t.ppf(0.975, len(apart) - 1) * stdev(apart) / len(apart) ** 0.5
        mean = fmean(apart) if "+" in said else abs(fmean(apart))
        shown = said.format(mean, interval)
        assert shown in claims, (name, one, other, shown)


def test_models_of_a_size_are_equally_large(example, tmp_path) -> None:
    """Blocks that no MLP can make equal, and names that are none, end the program."""
    plan = sys.modules["plan"]
    place = EXAMPLES / "hybrid_lm" / "hybrids.yaml"
    small = plan.load_plan(place, example.SMOKE)
    plan.check_equal(small)
    sizes = {"tiny": {**example.SMOKE["sizes"]["tiny"], "block": 5000}}
    with pytest.raises(SystemExit, match="block must be more than its mixers' parameters, got 5000"):
        plan.check_equal(plan.load_plan(place, {**example.SMOKE, "sizes": sizes}))
    with pytest.raises(
        SystemExit, match=r"variants.x must be of attention, m2rnn, gated_deltanet at tiny, got \['gru'\]"
    ):
        plan.load_plan(place, {**example.SMOKE, "variants": {"x": ["gru"]}, "compare": []})
    with pytest.raises(SystemExit, match="sizes and compare must name variants, got b"):
        plan.load_plan(place, {**example.SMOKE, "compare": [["with M²RNN", "b"]]})
    with pytest.raises(SystemExit, match="see widht"):
        plan.load_plan(place, {"widht": 3})


def test_steps_that_are_captured_train_as_others_do(example, device) -> None:
    """A tensor of the learning rate, batches at one place and, on a GPU, replays give an eager trainer's losses.

    That holds as well for one that goes on from another's state, and for the losses of batches that it is asked about,
    of which the last is shorter.
    """
    plan, captured = sys.modules["plan"], sys.modules["captured"]
    changes = {**example.SMOKE, "variants": {"both": ["gated_deltanet", "attention"]}, "compare": [], "steps": 12}
    run = next(iter(plan.load_plan(EXAMPLES / "hybrid_lm" / "hybrids.yaml", changes).runs()))
    batches = torch.randint(256, (8, 2, run.plan.batch, run.plan.seq), generator=torch.Generator().manual_seed(0))
    eager = sys.modules["model"].Trainer(run.config, device, run.model)
    expected = [eager.step(*rows).item() for rows in batches]
    with captured.own_stream(device):
        first, other = (captured.CapturedTrainer(run.config, device, run.model) for _ in range(2))
        found = [first.step(*rows).item() for rows in batches[:2]]
        other.restore(first.state())
        found += [other.step(*rows).item() for rows in batches[2:]]
        judged = [other.judged(*rows).item() for rows in (*batches[:3], batches[3][:, :, :-1])]
    assert found == pytest.approx(expected, rel=1e-4)
    expected = [eager.judged(*rows).item() for rows in (*batches[:3], batches[3][:, :, :-1])]
    assert judged == pytest.approx(expected, rel=1e-4)
    assert [one.graph is not None for one in (other.training, other.judging)] == 2 * [device.type == "cuda"]


@pytest.mark.gpu
def test_gated_deltanet_on_a_gpu(example, device) -> None:
    """Under autocast, at the comparison's sizes, results and gradients are those of float64 up to bfloat16."""
    torch.manual_seed(0)
    layer = delta().GatedDelta(384, 1, 256, 384).to(device)
    x = torch.randn(2, 1000, 384, device=device, requires_grad=True)
    dy = torch.randn_like(x)
    with torch.autocast("cuda", torch.bfloat16):
        y = layer(x)
    gates = (layer.A_log, layer.dt_bias)  # whose gradients are one sum over all tokens, in which most cancels
    wanted = [p for p in layer.parameters() if not any(p is gate for gate in gates)]
    found = [y, *torch.autograd.grad(y, [x, *wanted], dy.to(y.dtype))]
    layer, x = layer.double(), x.detach().double().requires_grad_()
    y = layer(x)
    exact = [y, *torch.autograd.grad(y, [x, *wanted], dy.double())]
    for ours, expected in zip(found, exact, strict=True):
        assert (ours.double() - expected).norm() < 2**-4 * expected.norm()
