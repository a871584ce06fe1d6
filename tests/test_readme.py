"""README and documentation keep their word: commands as CI runs them, Python that runs, links that lead somewhere."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = sorted((ROOT / "docs").glob("*.md"))

# Advice that Lightning gives to users (loggers, workers, intervals) is for the reader, not for the test.
pytestmark = pytest.mark.filterwarnings("ignore")


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    return [line for block in blocks(README, "bash") for line in block.splitlines()]


def test_two_commands_do_all_the_set_up() -> None:
    main, tests, *others = commands()
    for command in (main, tests):
        assert command.startswith("python3 -m venv .venv && .venv/bin/pip install -c constraints.txt ")
        assert "\\" not in command
    assert main.endswith(".venv/bin/python examples/quickstart.py")
    assert tests.endswith(".venv/bin/python -m pytest")
    assert others == ["python -m lightning_l2l sanity"]


def test_continuous_integration_runs_the_test_command_of_the_readme() -> None:
    """The very pattern in .ci/run finds exactly that line, so that the two cannot drift apart."""
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    pattern = re.search(r"grep -E '(.*?)' README\.md", script)
    assert pattern is not None
    found = [line for line in README.splitlines() if re.search(pattern[1], line)]
    assert found == [commands()[1]]
    assert "pip install" not in script  # nothing that hides a missing install step


def test_getting_started_repeats_the_command() -> None:
    assert commands()[0] in (ROOT / "docs" / "getting-started.md").read_text(encoding="utf-8")


@pytest.fixture
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # networks this small only wait for a second one
    monkeypatch.chdir(tmp_path)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("_in_an_empty_folder")
def test_three_lines_train() -> None:
    specification = importlib.util.spec_from_file_location("digits_task", ROOT / "examples" / "digits_task.py")
    assert specification is not None and specification.loader is not None
    task = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(task)
    (block,) = blocks(README, "python")
    assert len([line for line in block.splitlines() if "LearnToLearn" in line or "fit" in line]) == 3
    names = {"model": task.Classifier(), "datamodule": task.Digits()}
    exec(compile(block.replace("max_epochs=20", "max_epochs=3"), "README.md", "exec"), names)
    (callback,) = (found for found in names["trainer"].callbacks if type(found).__name__ == "LearnToLearn")
    assert callback.history


@pytest.mark.usefixtures("_in_an_empty_folder")
@pytest.mark.parametrize(
    "page", [path for path in PAGES if blocks(path.read_text(encoding="utf-8"), "python")], ids=lambda path: path.stem
)
def test_python_of_the_page_runs_in_order(page: Path) -> None:
    names: dict[str, object] = {"__name__": page.stem}
    for number, block in enumerate(blocks(page.read_text(encoding="utf-8"), "python")):
        # A meta-training of a minute is the right advice; that its code runs shows in three of its steps.
        block = block.replace("max_steps=100", "max_steps=3")
        exec(compile(block, f"{page.name}, block {number + 1}", "exec"), names)


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *PAGES], ids=lambda path: path.name)
def test_local_links_and_files_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", text) + re.findall(r"\{(?:image|include)\} (\S+)", text)
    for link in links:
        assert (page.parent / link).exists(), link
    for name in re.findall(r"`((?:docs|examples|lightning_l2l)/[\w./-]+\.\w+)`", text):
        assert (ROOT / name).exists(), name


def test_no_page_keeps_a_placeholder() -> None:
    for page in [ROOT / "README.md", *PAGES]:
        assert not re.search(r"PLACEHOLDER|TODO|FIXME|XXX", page.read_text(encoding="utf-8")), page.name


@pytest.mark.skipif(os.name == "nt", reason="a bash script")
def test_ci_script_is_valid_and_executable() -> None:
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o100
    assert subprocess.run(["bash", "-n", str(script)], capture_output=True).returncode == 0
