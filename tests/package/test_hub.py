"""Hub repositories through the ``kernels`` library itself, with no network."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from kernels._rust import Build, Digest, DigestAlgorithm, KernelName, Metadata
from kernels.variants import parse_variant
from support import SCHEDULES, build_package, make_variant
from written import on_disk

from m2gen.errors import PlaceError
from m2gen.package import directory, emit, hub, owned

NAME = "two_words"
"""A name whose repository is called otherwise: two-words."""
LAYER = """
import os, socket, sys
from pathlib import Path

def refused(*arguments, **options):
    raise AssertionError("the network was asked")

socket.socket.connect = socket.getaddrinfo = refused
import torch
import kernels
from kernels.backends import _backend

place = Path(sys.argv[1])
variant = place / "build" / f"torch-{_backend().name}"  # of this build of torch, with or without its GPU
torch.manual_seed(0)
"""
LOAD = (
    LAYER
    + """
loaded = kernels.get_local_kernel(place)
assert loaded.__file__ == str(variant / "__init__.py"), loaded.__file__
assert kernels.get_local_kernel(place) is loaded
layer = loaded.M2RNN.from_variant("layer", 8)
x = torch.randn(1, 3, 8)
y = layer(x)
y.square().sum().backward()
layer.backend = "reference"
assert torch.allclose(y, layer(x), atol=1e-5)
assert all(p.grad is not None for p in layer.parameters())
assert loaded.library.NAMESPACE == loaded.__name__
for backend in ("cpu", "cuda", "rocm"):  # also those whose torch is not here, by their folders
    other = kernels.get_local_kernel(place / "build" / f"torch-{backend}")
    assert other.__file__ == str(place / "build" / f"torch-{backend}" / "__init__.py")
    again = other.M2RNN.from_variant("layer", 8)
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again(x), y)
print(loaded.__name__)
"""
)
KERNELIZE = (
    LAYER
    + """
sys.path.insert(0, sys.argv[2])
from two_words import M2RNN  # the package of another build: a model's own layer
from kernels import LocalLayerRepository, Mode, kernelize, replace_kernel_forward_from_hub, use_kernel_mapping

replace_kernel_forward_from_hub(M2RNN, "M2RNN")
model = torch.nn.Sequential(M2RNN.from_variant("layer", 8), M2RNN.from_variant("layer", 8))
for layer in model:
    layer.backend = "reference"
x = torch.randn(1, 3, 8)
expected = model(x)
for layer in model:
    layer.backend = "kernels"
own = model[0].forward
mapping = {"M2RNN": {"cpu": LocalLayerRepository(place, layer_name="M2RNN")}}
for mode in (Mode.INFERENCE, Mode.TRAINING, Mode.TRAINING | Mode.TORCH_COMPILE):
    with use_kernel_mapping(mapping, inherit_mapping=False):
        kernelize(model, mode=mode, device="cpu", use_fallback=False)
    forward = model[0].forward.__func__
    source = forward.__code__.co_filename
    assert source == str(variant / "layers.py"), source
    y = model(x)
    assert torch.allclose(y, expected, atol=1e-5)
model.zero_grad()
y.square().sum().backward()
assert all(p.grad is not None for p in model.parameters())
print(type(model[0]).__module__)
"""
)


@pytest.fixture(scope="module")
def package() -> emit.Package:
    """Return a package of one variant."""
    return build_package(NAME, [make_variant(rows=16, cols=16, heads=(1, 1, 1, 1, 1))], SCHEDULES["one_level_atomic"])


@pytest.fixture(scope="module")
def repository(package: emit.Package, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a repository on disk, beside the same package as a build would write it."""
    place = tmp_path_factory.mktemp("hub")
    origin, manifest = emit.Origin(NAME, "two.yaml", "0" * 12), emit.manifest_text(package, {})
    directory.write(place / hub.kernel_name(origin), hub.kernel_repository(origin, package, manifest))
    directory.write(place / NAME, {**package.files, directory.MANIFEST: manifest})
    return place / "two-words"


def isolated(code: str, *arguments: object) -> str:
    """Run code in a process without the Hub, and return what it printed."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_repository_loads(repository: Path, package: emit.Package) -> None:
    """get_local_kernel takes the variant of this torch; its layer trains, and its operators have the module's name."""
    assert isolated(LOAD, repository) == package.namespace


def test_the_repository_serves_kernelize(repository: Path) -> None:
    """kernelize puts the repository's forward in the place of a model's, for inference, training and compilation."""
    assert isolated(KERNELIZE, repository, repository.parent) == "two_words.layer"


def test_kernels_parses_what_is_written(repository: Path, package: emit.Package) -> None:
    """The library's own parser takes build.toml without an upgrade, and each variant's metadata and digest hold."""
    written = tomllib.loads((repository / "build.toml").read_text(encoding="utf-8"))
    backends = [str(backend).lower() for backend in Build.open(repository).general.backends]
    assert backends == written["general"]["backends"] == list(hub.BACKENDS)
    assert sorted(path.name for path in (repository / "build").iterdir()) == [f"torch-{name}" for name in backends]
    for backend in backends:
        folder = repository / "build" / f"torch-{backend}"
        assert parse_variant(folder.name).variant_str == folder.name
        metadata = Metadata.read_from_file(folder / "metadata.json")
        assert (metadata.name, metadata.id) == (KernelName("two-words"), package.namespace)
        assert metadata.name.python_name == NAME
        assert (metadata.version, metadata.license) == (written["general"]["version"], written["general"]["license"])
        assert str(metadata.backend.backend_type).lower() == backend
        assert metadata.digest is not None
        metadata.digest.validate(Digest.hash_variant(DigestAlgorithm.SHA256, folder))
        held = {path: data for path, data in on_disk(folder).items() if path != "metadata.json"}
        assert held == on_disk(repository / "torch-ext" / NAME) == on_disk(repository.parent / NAME)


@pytest.mark.parametrize("edition", [4, 6])
def test_the_parser_tells_editions_apart(repository: Path, tmp_path: Path, edition: int) -> None:
    """This version of kernels refuses any edition but its own, which the test above relies on."""
    text = (repository / "build.toml").read_text(encoding="utf-8")
    (tmp_path / "build.toml").write_text(text.replace("edition = 5", f"edition = {edition}"), encoding="utf-8")
    with pytest.raises(ValueError, match=f"unsupported build edition {edition}"):
        Build.open(tmp_path)


def test_a_repository_is_owned_by_its_own_manifest(package: emit.Package, tmp_path: Path) -> None:
    """Every file is in it; what the Hub, git or somebody added keeps a build away, and .git stays."""
    origin, manifest = emit.Origin(NAME, "two.yaml", "0" * 12), emit.manifest_text(package, {})
    files = hub.kernel_repository(origin, package, manifest)
    place = tmp_path / "two-words"
    directory.write(place, files)
    assert owned.listed_in(place) == set(on_disk(place)) == set(files)
    assert json.loads(files[directory.MANIFEST])["format"] == "hf-kernel"
    (place / ".git").mkdir()
    newer = {**files, **hub.kernel_repository(origin, package, emit.manifest_text(package, {"toolchain": "new"}))}
    directory.write(place, newer)
    assert {path: text.encode() for path, text in newer.items()} == on_disk(place)
    assert (place / ".git").is_dir()
    for name in (".gitattributes", "build/torch211-cu128/one.so", "torch-ext/two_words/_ops.py"):
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_text("mine", encoding="utf-8")
        with pytest.raises(PlaceError, match=f"what m2gen did not write: {name};"):
            directory.write(place, files)
        (place / name).unlink()
        owned.prune(place, ["build/torch211-cu128"])
    directory.write(place, files)
