"""Searches open in optuna-dashboard: its server, asked for what its pages show."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import simulated
from searches import NEIGHBOUR, SPEC, Silent

from m2gen.db import Database
from m2gen.pipeline import plan
from m2gen.pipeline.goals import TuneRequest
from m2gen.pipeline.tune import Tuned, tune

dashboard = pytest.importorskip("optuna_dashboard", reason="needs optuna-dashboard (pip install 'm2gen[dev]')")


def _search(folder: Path, storage: str | None) -> Tuned:
    simulated.script(folder / "script.json", wrong=[NEIGHBOUR])
    request = TuneRequest(Database(folder / "db"), seconds=60, trials=30, storage=storage)
    (tuned,) = tune(plan("one.yaml"), request, simulated.context(), Silent())
    return tuned


def _get(app: Any, path: str) -> Any:
    """Return what the dashboard's API answers."""
    status = []
    environ = {"REQUEST_METHOD": "GET", "PATH_INFO": path, "QUERY_STRING": "", "wsgi.input": io.BytesIO()}
    environ |= {"SERVER_NAME": "localhost", "SERVER_PORT": "80", "wsgi.url_scheme": "http"}
    environ |= {"wsgi.errors": io.StringIO()}
    body = b"".join(app(environ, lambda line, headers, *_: status.append(line)))
    assert status == ["200 OK"], body
    return json.loads(body)


@pytest.mark.parametrize("kind", ["journal", "database"])
def test_a_search_opens_in_the_dashboard(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its study, with what it is about, every trial with its knobs and state, and the best."""
    folder = simulated.place(tmp_path, monkeypatch, SPEC).parent
    url = f"sqlite:///{tmp_path}/study.db" if kind == "database" else None
    tuned = _search(folder, url)
    app = dashboard.wsgi(url or str(next((folder / "cache" / "tune").glob("*.log"))))
    (summary,) = _get(app, "/api/studies")["study_summaries"]
    found = _get(app, f"/api/studies/{summary['study_id']}")
    attributes = {each["key"]: json.loads(each["value"].replace("'", '"')) for each in found["user_attrs"]}
    assert attributes["search"]["device"] == "Simulated GPU"
    states = [trial["state"] for trial in found["trials"]]
    assert (states.count("Complete"), states.count("Fail"), len(states)) == (29, 1, 30)
    assert len(found["best_trials"]) == 1
    fastest = min(trial.median_ms for trial in tuned.outcome.trials if trial.median_ms)
    assert found["best_trials"][0]["values"] == [fastest]
    names = {parameter["name"] for parameter in found["best_trials"][0]["params"]}
    assert {"family", "forward.rows", "backward.chunk", "tanh"} <= names
