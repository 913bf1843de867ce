"""The C launchers that Triton before 3.7 builds for each signature of a kernel, which a first call waits for, too."""

from __future__ import annotations

import atexit
import contextlib
import importlib
import logging
import os
import shutil
import subprocess
import tempfile
from typing import Any

LIBRARY = "libcuda.so.1"


def build_stub(kernel: Any) -> None:
    """Have Triton build the launcher of a kernel for NVIDIA's GPUs into its cache, where it builds one each.

    Nothing is wrong where that cannot be done, without a C compiler, say: the first call tells.
    """
    if kernel.metadata.target.backend != "cuda":
        return
    driver = importlib.import_module("triton.backends.nvidia.driver")
    if hasattr(driver, "make_launcher"):
        with contextlib.suppress(Exception):
            _provide_library(driver)
            driver.CudaLauncher(kernel.src, kernel.metadata)  # written before it is loaded, which needs the library


def _provide_library(driver: Any) -> None:
    """Have launchers linked against an empty library of the driver's name where there is no driver, as in a build."""
    try:
        driver.libcuda_dirs()
    except Exception:
        folder = tempfile.mkdtemp(prefix="m2rnn-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        command = [os.environ.get("CC", "cc"), "-shared", "-x", "c", os.devnull, "-o", f"{folder}/{LIBRARY}"]
        subprocess.run(command, check=True, capture_output=True)
        importlib.import_module("triton").knobs.nvidia.libcuda_path = folder
        logging.getLogger("triton.runtime.build").setLevel(logging.ERROR)  # it warns of what it cannot load here
