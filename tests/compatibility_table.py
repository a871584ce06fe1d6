"""Writes docs/compatibility_table.md from the tests' marks ``@pytest.mark.feature(name, verdict, remark, topic=...)``.

    python tests/compatibility_table.py

A line of the table is what a test promises: no line without a test, and ``test_compatibility_table.py`` fails where
the file is not what the tests say.
"""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
TABLE = ROOT / "docs" / "compatibility_table.md"
VERDICTS = ("works", "training gradients", "observes", "refused")
TOPICS = {
    "optimizer": "Optimizers",
    "strategy": "Strategies",
    "precision": "Precision",
    "schedule": "Schedules",
    "data": "Data",
    "step": "Training steps",
    "loop": "Loops",
    "callback": "Callbacks and loggers",
    "project": "Projects",
    "": "Everything else in Lightning",
}


@dataclass(frozen=True)
class Feature:
    """One mark.

    Attributes:
        name: What people search for.
        verdict: Whether it works, works on training gradients alone, is only observed, or is refused.
        remark: How, in a few words.
        test: The test that has the mark, as ``file::function``.
        topic: The part of the page.
    """

    name: str
    verdict: str
    remark: str
    test: str
    topic: str = ""


def features(folder: Path = ROOT / "tests") -> list[Feature]:
    """All marks, in the order of the files and within them.

    Raises:
        ValueError: A mark with an unknown verdict, or two that say different things of a feature.
    """
    found: list[Feature] = []
    for path in sorted(folder.glob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                for mark in node.decorator_list:
                    if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.feature":
                        given = [ast.literal_eval(argument) for argument in mark.args]
                        name, verdict, remark = given + ["", "works", ""][len(given) :]
                        (topic,) = [ast.literal_eval(k.value) for k in mark.keywords if k.arg == "topic"] or [""]
                        found.append(Feature(name, verdict, remark, f"{path.name}::{node.name}", topic))
    for feature in found:
        if feature.verdict not in VERDICTS:
            raise ValueError(f"{feature.test}: the verdict {feature.verdict!r} is none of {VERDICTS}.")
        if feature.topic not in TOPICS:
            raise ValueError(f"{feature.test}: the topic {feature.topic!r} is none of {list(TOPICS)}.")
        if any(other.name == feature.name and other.verdict != feature.verdict for other in found):
            raise ValueError(f"{feature.name!r} has one verdict by one test and is refused by another.")
    return found


def versions() -> dict[str, list[str]]:
    """The versions that the tests run with: the oldest of the workflow file, and those of constraints.txt."""
    oldest = (ROOT / ".github" / "workflows" / "tests.yml").read_text(encoding="utf-8")
    newest = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    return {
        package: [re.findall(rf"(?m)(?:^|\s){package}==([\w.]+)", text)[0] for text in (oldest, newest)]
        for package in ("lightning", "torch")
    }


def table() -> str:
    """The page."""
    tested = versions()
    lines = [
        "<!-- Written by tests/compatibility_table.py from the tests: change their marks, not this file. -->",
        "",
        f"Tested with Lightning {' and '.join(tested['lightning'])}, and torch {' and '.join(tested['torch'])}.",
        "",
    ]
    for topic, title in TOPICS.items():
        merged: dict[str, list[Feature]] = {}
        for feature in features():
            if feature.topic == topic:
                merged.setdefault(feature.name, []).append(feature)
        if merged:
            lines += [f"| {title} | | | test |", "| --- | --- | --- | --- |"]
        for name, same in sorted(merged.items(), key=lambda item: VERDICTS.index(item[1][0].verdict)):
            remark = next((feature.remark for feature in same if feature.remark), "")
            files = ", ".join(dict.fromkeys(f"`{feature.test.split('::')[0]}`" for feature in same))
            lines.append(f"| {name} | {same[0].verdict} | {remark} | {files} |")
        lines += [""] if merged else []
    return "\n".join(lines)


if __name__ == "__main__":
    TABLE.write_text(table(), encoding="utf-8")
