"""Program text that every machine has, by the tens of millions of bytes, split by file into training and validation."""

from __future__ import annotations

import hashlib
import os
import site
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from files import store
from torch import Tensor

SUFFIXES = (".py", ".pyi", ".h", ".hpp", ".cuh", ".cpp", ".c", ".cu")
"""Names of files that are taken, the first ones first where all are too many."""
SIZES = range(200, 1 << 19)
"""Bytes of a file: longer ones are mostly tables that programs wrote."""
LONG = 20
"""Bytes of a line, without its spaces, that may say that a file was copied."""


@dataclass(frozen=True)
class Choice:
    """What is gathered: at most ``limit`` bytes, every ``validation``-th file on average of them for validation.

    ``roots`` are folders; without any, those of the standard library and of installed packages.
    """

    limit: int
    validation: int
    roots: tuple[str, ...] = ()


@dataclass(frozen=True)
class Facts:
    """What was gathered: files and bytes of each part, and 16 hex digits of the SHA-256 of both."""

    train_files: int
    train_bytes: int
    validation_files: int
    validation_bytes: int
    dropped: int
    """Files of the validation that were left out, since most of their lines are in the training text."""
    digest: str


@dataclass(frozen=True)
class Text:
    """The bytes to train on and those to judge by."""

    train: Tensor
    validation: Tensor
    facts: Facts

    def to(self, device: torch.device) -> Text:
        """Return the same on a device, from which batches are then taken without a transfer."""
        return Text(self.train.to(device), self.validation.to(device), self.facts)


def gather(choice: Choice) -> Text:
    """Read files until there are enough, each content once; which and in what order depends on names and contents."""
    parts: dict[bool, list[bytes]] = {False: [], True: []}
    seen: set[bytes] = set()
    total = 0
    for name, path in listed(choice.roots or default_roots()):
        content = contents(path)
        key = hashlib.sha256(b"".join(content.split())).digest()
        if not content or key in seen:
            continue
        seen.add(key)
        if total + len(content) > choice.limit:
            break
        total += len(content)
        parts[int.from_bytes(digest_of(name)[-4:], "big") % choice.validation == 0].append(content)
    known = {line for content in parts[False] for line in lines_of(content)}
    fresh = [content for content in parts[True] if not copied(content, known)]
    dropped = len(parts[True]) - len(fresh)
    if not fresh or not parts[False]:
        raise SystemExit(f"text must have files to train on and to validate with, got {total} bytes of files")
    train, validation = b"\n".join(parts[False]), b"\n".join(fresh)
    digest = hashlib.sha256(train + b"\0" + validation).hexdigest()[:16]
    facts = Facts(len(parts[False]), len(train), len(fresh), len(validation), dropped, digest)
    return Text(tensor_of(train), tensor_of(validation), facts)


def kept(choice: Choice, place: Path) -> Text:
    """Return the text in a file, or gather it and write that file, so that all runs beside it have the same text.

    One that was gathered by another choice ends the program; a file from before files said by which is taken.
    """
    if place.is_file():
        saved = torch.load(place, weights_only=True)
        if saved.get("choice", asdict(choice)) != asdict(choice):
            raise SystemExit(f"{place} must be of {choice}, but is of {saved['choice']}; give another --out")
        return Text(saved["train"], saved["validation"], Facts(**saved["facts"]))
    text = gather(choice)
    saved = {"train": text.train, "validation": text.validation, "facts": vars(text.facts), "choice": asdict(choice)}
    store(place, lambda path: torch.save(saved, path))
    return text


def default_roots() -> list[str]:
    """Return the folders of the standard library and of installed packages, those of an environment's base, too."""
    paths = sysconfig.get_paths()
    packages = [paths["purelib"], paths["platlib"], *site.getsitepackages()]
    base = f"{sys.base_prefix}/lib/python{sysconfig.get_python_version()}/site-packages"
    return list(dict.fromkeys(os.path.realpath(path) for path in (paths["stdlib"], *packages, base)))


def listed(roots: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Yield (name below its root, path) of every file, by suffix and then by a hash of the name.

    The hash mixes packages, so that a part of all files is a part of each package.
    """
    found: dict[str, str] = {}
    for root in roots:
        for folder, below, names in os.walk(root):
            # What lies in site-packages is listed as that.
            below[:] = [name for name in below if name not in ("__pycache__", "site-packages", "dist-packages")]
            for name in names:
                if name.endswith(SUFFIXES):
                    path = os.path.join(folder, name)
                    found.setdefault(os.path.relpath(path, root), path)
    rank = {suffix: i for i, suffix in enumerate(SUFFIXES)}
    yield from sorted(found.items(), key=lambda item: (rank[os.path.splitext(item[0])[1]], digest_of(item[0])))


def digest_of(name: str) -> bytes:
    """Return the hash of a file's name."""
    return hashlib.sha256(name.encode(errors="surrogateescape")).digest()


def contents(path: str) -> bytes:
    """Return what a file holds, or nothing where it is no text of the sizes wanted."""
    try:
        if os.stat(path).st_size not in SIZES:
            return b""
        content = Path(path).read_bytes()
    except OSError:
        return b""
    return b"" if b"\0" in content else content.replace(b"\r\n", b"\n")


def lines_of(content: bytes) -> Iterator[int]:
    """Yield a number for each line that is long enough to be known again."""
    for line in content.splitlines():
        bare = line.strip()
        if len(bare) >= LONG:
            yield hash(bare)


def copied(content: bytes, known: set[int]) -> bool:
    """Say whether most of a file's lines are known."""
    lines = list(lines_of(content))
    return 2 * sum(line in known for line in lines) > len(lines)


def tensor_of(text: bytes) -> Tensor:
    """Return bytes as a tensor."""
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


def batch(text: Tensor, size: int, length: int, seed: int, step: int) -> tuple[Tensor, Tensor]:
    """Return inputs and next bytes (size, length) of a step on the text's device, the same for every model."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    starts = torch.randint(len(text) - length - 1, (size, 1), generator=generator)
    rows = text[starts.to(text.device, non_blocking=True) + torch.arange(length + 1, device=text.device)].long()
    return rows[:, :-1], rows[:, 1:]


def windows(text: Tensor, limit: int, size: int, length: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches of inputs and next bytes that cover at most ``limit`` bytes, spread evenly over the text."""
    every = max(1, (len(text) - 1) // length)
    count = max(1, min(every, limit // length))
    starts = torch.arange(count, device=text.device) * every // count * length
    for some in starts.split(size):
        rows = text[some[:, None] + torch.arange(length + 1, device=text.device)].long()
        yield rows[:, :-1], rows[:, 1:]
