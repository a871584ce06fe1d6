"""The shape of the code: what may import what, and how long a file may be."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "lightning_l2l"
FILES = sorted(PACKAGE.rglob("*.py"))
FRAMEWORKS = {"lightning", "pytorch_lightning", "lightning_fabric"}


def imported(path: Path) -> set[str]:
    """Every module that a file imports anywhere, inside functions too; names under TYPE_CHECKING do not run."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text(encoding="utf-8")))
    return found


def layer(name: str) -> list[Path]:
    return [path for path in FILES if path.relative_to(PACKAGE).parts[0] == name]


@pytest.mark.parametrize("name", ["core", "optimizers", "tasks"])
def test_core_knows_neither_lightning_nor_the_host(name: str) -> None:
    assert layer(name)
    for path in layer(name):
        modules = imported(path)
        assert not {module for module in modules if module.split(".")[0] in FRAMEWORKS}, path
        assert not {
            module for module in modules if module.startswith(("lightning_l2l.host", "lightning_l2l.callback"))
        }, path


def test_tasks_and_optimizers_are_not_needed_by_each_other() -> None:
    for path in layer("optimizers"):
        assert not {module for module in imported(path) if module.startswith("lightning_l2l.tasks")}, path


def test_host_does_not_know_the_callback() -> None:
    for path in layer("host"):
        assert "lightning_l2l.callback" not in imported(path), path


def test_callback_does_no_mathematics() -> None:
    """Its tensors come from the core and go to the core: no autograd, no functional transforms."""
    source = (PACKAGE / "callback.py").read_text(encoding="utf-8")
    assert not any(word in source for word in ("autograd", "torch.func", ".backward("))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_file_is_one_idea_long(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    assert len(source.splitlines()) <= 300
    if source.strip():
        assert ast.get_docstring(ast.parse(source)), "says what it is about"


def test_a_forbidden_import_would_be_seen(tmp_path: Path) -> None:
    path = tmp_path / "bad.py"
    path.write_text("def f():\n    from lightning.pytorch import Trainer\n", encoding="utf-8")
    assert "lightning.pytorch" in imported(path)
