"""docs/reliability.md says what is true: every fault has its row, every test that it names."""

import ast
import re

from tests.conftest import ROOT

TABLE = (ROOT / "docs" / "reliability.md").read_text("utf-8")
NAMED = re.findall(r"`([\w/]+\.py)::(\w+)`", TABLE)


def test_every_one_of_the_42_faults_has_a_row_with_a_test_or_says_why_not():
    rows = [line for line in TABLE.splitlines() if re.match(r"\| \d+ \|", line)]
    assert [int(row.split("|")[1]) for row in rows] == list(range(1, 43))
    for row in rows:
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert len(cells) == 5 and all(cells), row
        assert "::test_" in cells[4] or cells[4].startswith("not tested: "), row


def test_every_test_of_faults_is_named_in_the_table():
    there = {
        (f"faults/{path.name}", node.name)
        for path in (ROOT / "tests" / "faults").glob("test_*.py")
        if path.name != "test_table.py"
        for node in ast.parse(path.read_text("utf-8")).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }
    assert there - set(NAMED) == set()
