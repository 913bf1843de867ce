"""Processes that compile a package's kernels, each with no GPU and the package to itself."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from .scenes import Kernel, Scene

Group = Sequence[Scene]
"""Scenes that may share kernels, which one process compiles."""
SECONDS = 600.0
"""Longest that a process may take for a group."""
NAME = "m2rnn_in_a_process_of_its_own"
_MAIN = f"""
import importlib, importlib.util, json, sys
facts = json.loads(sys.stdin.readline())
sys.path[:] = facts["path"]
folder = facts["folder"]
spec = importlib.util.spec_from_file_location({NAME!r}, folder + "/__init__.py", submodule_search_locations=[folder])
package = sys.modules[{NAME!r}] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(package)
importlib.import_module({NAME!r} + ".crew").serve(facts["arch"], facts["anywhere"])
"""


def compile_all(groups: Iterable[Group], arch: str, processes: int, anywhere: bool = False) -> list[Kernel]:
    """Compile all groups in parallel processes; return the kernels, each of a module once.

    ``anywhere`` has kernels name no path of this machine as that of their source. Raises RuntimeError if any kernel
    cannot be compiled, once all others are.
    """
    waiting = deque(groups)
    kernels: dict[tuple[str, str], Kernel] = {}
    failures: list[str] = []

    def take(group: Group, answer: Mapping[str, Any]) -> bool:
        """Keep what a process says of a group, and return whether it may go on."""
        for kernel in (Kernel(*facts) for facts in answer.get("kernels", ())):
            known = kernels.setdefault((kernel.module, kernel.digest), kernel)
            kernels[kernel.module, kernel.digest] = kernel if known.found else known
        if "error" in answer:
            scene = group[0]
            failures.append(f"{scene.module} {scene.side} to {scene.use}: {answer['error']}")
        return "error" not in answer

    def work() -> None:
        worker = _Worker(arch, anywhere)
        try:
            while waiting:
                with contextlib.suppress(IndexError):  # another thread took the last one
                    group = waiting.popleft()
                    if not take(group, worker.compile(group)):
                        worker.stop()
        finally:
            worker.stop()

    count = max(1, min(processes, len(waiting)))
    with ThreadPoolExecutor(count) as pool:
        try:
            for future in [pool.submit(work) for _ in range(count)]:
                future.result()
        finally:
            waiting.clear()
    if failures:
        raise RuntimeError("warm_up: kernels must compile, got\n" + "\n".join(sorted(failures)))
    return list(kernels.values())


class _Worker:
    """A process that compiles one group after the other; it starts with the first."""

    def __init__(self, arch: str, anywhere: bool) -> None:
        folder = str(Path(__file__).parent)
        self._facts = {"path": sys.path, "folder": folder, "arch": arch, "anywhere": anywhere}
        self._process: subprocess.Popen[str] | None = None
        self._late = False

    def compile(self, group: Group) -> dict[str, Any]:
        """Return what the process says of a group: kernels, or an error."""
        process = self._process = self._process or self._started()
        assert process.stdin is not None
        assert process.stdout is not None
        self._late = False
        timer = threading.Timer(SECONDS, self._expire)
        timer.start()
        try:
            process.stdin.write(json.dumps(group) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except OSError:
            line = ""
        finally:
            timer.cancel()
        if line:
            answer: dict[str, Any] = json.loads(line)
            return answer
        status = process.wait()
        return {"error": f"took longer than {SECONDS:g} s" if self._late else f"its process ended with status {status}"}

    def _started(self) -> subprocess.Popen[str]:
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}
        environment.pop("TRITON_INTERPRET", None)
        process = subprocess.Popen(
            [sys.executable, "-c", _MAIN], env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        assert process.stdin is not None
        process.stdin.write(json.dumps(self._facts) + "\n")
        return process

    def _expire(self) -> None:
        """End the process, since its time for a group is over."""
        self._late = True
        self._kill()

    def _kill(self) -> None:
        """End the process and what it started, such as an assembler."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)

    def stop(self) -> None:
        """End the process, whatever it does."""
        if self._process is None:
            return
        if self._process.poll() is None:
            self._kill()
        self._process.communicate()
        self._process = None


def serve(arch: str, anywhere: bool) -> None:
    """Compile groups from standard input as ``compile_all`` asks, in a process of its own."""
    import torch

    from .rehearsal import compile_scene, forget_paths

    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # whatever a compiler prints is no answer
    torch.set_num_threads(1)
    if anywhere:
        forget_paths()
    for line in sys.stdin:
        try:
            scenes = [Scene(*scene) for scene in json.loads(line)]
            kernels = [kernel for scene in scenes for kernel in compile_scene(scene, arch)]
            answer: dict[str, Any] = {"kernels": list(dict.fromkeys(kernels))}
        except Exception as error:  # a compiler may raise anything
            answer = {"error": f"{type(error).__name__}: {error}"}
        try:
            answers.write(json.dumps(answer) + "\n")
            answers.flush()
        except BrokenPipeError:  # who asked has ended
            os._exit(1)
