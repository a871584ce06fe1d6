"""Imports go down only, and Lightning stays above the mathematics."""

from __future__ import annotations

import ast
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "lightning_l2l"
# From the bottom up: a layer may import itself and those before it.
LAYERS = ("functional", "learned", "exact", "tasks", "meta_training", "host", "callback")
# The default path stands beside them: it needs nothing but the optimizer's step.
DEFAULT_PATH = ("displacement", "guard", "range_test")
MAY_IMPORT_LIGHTNING = ("host", "callback", "meta_training", "commands", "__main__")
LIGHTNING = ("lightning", "pytorch_lightning", "lightning_fabric", "lightning_utilities")


def imports() -> list[tuple[str, str]]:
    """Each import of the package, also inside functions: (part of the package, full name of what it imports)."""
    found = []
    for path in PACKAGE.rglob("*.py"):
        part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found += [(part, alias.name) for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                found.append((part, node.module))
                if node.module == "lightning_l2l":
                    found += [(part, f"lightning_l2l.{alias.name}") for alias in node.names]
    return found


def test_imports_go_down_only() -> None:
    within = [(part, name.split(".")[1]) for part, name in imports() if name.startswith("lightning_l2l.")]
    upward = [
        (part, imported)
        for part, imported in within
        if part in LAYERS and imported in LAYERS and LAYERS.index(imported) > LAYERS.index(part)
    ]
    assert not upward
    assert not [pair for pair in within if pair[0] in DEFAULT_PATH and pair[1] in LAYERS]
    assert {"functional", "learned", "exact"} <= {part for part, _ in within}  # the walk has seen something


def test_lightning_is_imported_by_the_host_alone() -> None:
    users = {part for part, name in imports() if name.split(".")[0] in LIGHTNING}
    assert users <= set(MAY_IMPORT_LIGHTNING)
    assert "host" in users
