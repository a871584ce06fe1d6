"""What is shipped: complete, installable, with one version, and pinned for those who want to reproduce."""

from __future__ import annotations

import email
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import lightning_l2l

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(not (ROOT / "pyproject.toml").exists(), reason="needs the source tree")

BUILD = "import setuptools.build_meta as b, sys; print(getattr(b, 'build_' + sys.argv[1])(sys.argv[2]))"


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The sdist of a copy of the tree, and a wheel built from nothing but that sdist; setuptools, offline."""
    folder = tmp_path_factory.mktemp("build")
    source = folder / "tree"
    source.mkdir()
    for name in ("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff",
                 "CONTRIBUTING.md", "constraints.txt"):  # fmt: skip
        shutil.copy(ROOT / name, source)
    ignore = shutil.ignore_patterns("__pycache__", "_build")
    for name in ("lightning_l2l", "tests", "examples", "docs"):
        shutil.copytree(ROOT / name, source / name, ignore=ignore)
    sdist = build("sdist", source, folder)
    unpacked = folder / "unpacked"
    with tarfile.open(sdist) as archive:
        archive.extractall(unpacked, filter="data")
    (only,) = unpacked.iterdir()
    return {"sdist": sdist, "wheel": build("wheel", only, folder)}


def build(kind: str, source: Path, folder: Path) -> Path:
    done = subprocess.run([sys.executable, "-c", BUILD, kind, str(folder)], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / done.stdout.splitlines()[-1]


def test_wheel_has_every_module_the_type_marker_and_the_licence(distributions: dict[str, Path]) -> None:
    with zipfile.ZipFile(distributions["wheel"]) as wheel:
        names = set(wheel.namelist())
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "lightning_l2l").rglob("*.py")}
    assert modules <= names
    assert "lightning_l2l/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not {name for name in names if name.startswith(("tests/", "examples/", "docs/"))}


def test_sdist_has_what_the_tests_need(distributions: dict[str, Path]) -> None:
    with tarfile.open(distributions["sdist"]) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    expected = {"constraints.txt", "CHANGELOG.md", "docs/conf.py", "examples/digits.yaml", "tests/test_packaging.py"}
    expected |= {path.relative_to(ROOT).as_posix() for path in (ROOT / "tests" / "data").iterdir() if path.is_file()}
    assert expected <= names


def test_wheel_works_from_where_it_is(distributions: dict[str, Path], tmp_path: Path) -> None:
    """Imported from the wheel itself, far from the source tree."""
    program = (
        "import lightning_l2l, sys; from lightning_l2l.tasks import Quadratic; "
        "assert sys.argv[1] in lightning_l2l.__file__, lightning_l2l.__file__; "
        "lightning_l2l.LearnToLearn(); print(lightning_l2l.__version__)"
    )
    wheel = distributions["wheel"]
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, sys.argv[1]); {program}", str(wheel)],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == lightning_l2l.__version__


def test_version_is_written_in_one_place_and_cited() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8").split("[project]\n")[1].split("\n[")[0]
    assert not re.search(r"^version", project, re.MULTILINE) and 'dynamic = ["version"]' in project
    cited = re.search(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(encoding="utf-8"), re.MULTILINE)
    assert cited is not None and cited[1] == lightning_l2l.__version__
    assert f"[{lightning_l2l.__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def constraints() -> dict[str, Requirement]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    found = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(requirement.name): requirement for requirement in found}


def test_constraints_are_exact_and_good_anywhere() -> None:
    """No local versions (+cpu), no addresses: pip accepts the file with -c on any machine."""
    for name, requirement in constraints().items():
        (pin,) = requirement.specifier
        assert pin.operator == "==" and "+" not in pin.version, name
        assert requirement.url is None and not requirement.extras, name
    assert str(constraints()["torch"].specifier) == "==2.13.0"


def test_constraints_cover_every_dependency_and_extra_and_agree(distributions: dict[str, Path]) -> None:
    with zipfile.ZipFile(distributions["wheel"]) as wheel:
        (name,) = (name for name in wheel.namelist() if name.endswith("/METADATA"))
        metadata = email.message_from_string(wheel.read(name).decode("utf-8"))
    listed = [Requirement(line) for line in metadata.get_all("Requires-Dist", [])]
    assert len(listed) > 10
    pins = constraints()
    for requirement in listed:
        pin = pins[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(next(iter(pin.specifier)).version), requirement
