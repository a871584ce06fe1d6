"""The table of what works and what is refused is what the tests say."""

from __future__ import annotations

from pathlib import Path

import pytest
from compatibility_table import TABLE, Feature, features, table

MARKED = "import pytest\n\n@pytest.mark.feature({})\ndef test_x():\n    pass\n"


def test_the_table_in_the_documentation_is_what_the_tests_say() -> None:
    assert TABLE.read_text(encoding="utf-8") == table(), "run: python tests/compatibility_table.py"


def test_marks_are_read_as_they_are_written(tmp_path: Path) -> None:
    (tmp_path / "test_a.py").write_text(MARKED.format("'one'") + MARKED.format("'two', 'refused', 'why', topic='data'"))
    assert features(tmp_path) == [
        Feature("one", "works", "", "test_a.py::test_x"),
        Feature("two", "refused", "why", "test_a.py::test_x", "data"),
    ]


@pytest.mark.parametrize("marks", [["'one', 'fails'"], ["'one'", "'one', 'refused'"], ["'one', topic='weather'"]])
def test_marks_that_cannot_be_are_refused(tmp_path: Path, marks: list[str]) -> None:
    (tmp_path / "test_a.py").write_text("".join(MARKED.format(mark) for mark in marks))
    with pytest.raises(ValueError, match="verdict|topic"):
        features(tmp_path)
