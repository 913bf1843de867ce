"""A PostgreSQL server of its own behind a socket in its folder, from the binaries that the system has."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def binaries() -> Path | None:
    """Return the folder of initdb and pg_ctl, or None where PostgreSQL's server is not installed."""
    found = [path.parent for path in sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), reverse=True)]
    on_path = shutil.which("initdb")
    return found[0] if found else Path(on_path).resolve().parent if on_path else None


def account() -> str | None:
    """Return the user to run the server as: not root, which PostgreSQL refuses; None for this one."""
    if os.geteuid() != 0:
        return None
    names = [entry.pw_name for entry in pwd.getpwall()]
    return "postgres" if "postgres" in names else "nobody"


@contextmanager
def server() -> Iterator[str]:
    """Yield the URL of an empty database, gone with its server afterwards."""
    folder = binaries()
    assert folder is not None
    user = account()
    with tempfile.TemporaryDirectory(prefix="m2gen-pg-") as name:
        root, data = Path(name), Path(name) / "data"
        if user is not None:
            shutil.chown(root, user)

        def run(*command: str) -> None:
            done = subprocess.run(
                [str(folder / command[0]), *command[1:]],
                cwd=root,
                user=user,
                capture_output=True,
                text=True,
                check=False,
            )
            assert done.returncode == 0, done.stdout + done.stderr

        run("initdb", "-D", str(data), "-U", "m2gen", "-A", "trust", "--no-sync", "-E", "UTF8", "--locale=C")
        options = f"-c listen_addresses='' -c unix_socket_directories={root} -c fsync=off"
        run("pg_ctl", "-D", str(data), "-w", "-t", "3600", "-l", str(root / "log"), "-o", options, "start")
        try:
            yield f"postgresql://m2gen@/postgres?host={root}"
        finally:
            run("pg_ctl", "-D", str(data), "-m", "immediate", "stop")
