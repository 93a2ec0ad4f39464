"""The records behind the tables of docs/results.md are whole, comparable within a table, and say nothing of a machine's
folders."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from darkroom.evaluation.protocol import read_record

DOCS = Path(__file__).parent.parent / "docs"
TABLES = sorted({path.parent for path in (DOCS / "records").rglob("*.json")})


def test_the_page_names_the_tables_that_have_records() -> None:
    page = (DOCS / "records" / "README.md").read_text()
    named = [line.split("|")[1] for line in page.splitlines() if line.startswith("| `")]
    folders = {table.relative_to(DOCS / "records").parts[0] for table in TABLES}
    assert folders == {name.strip(" `") for names in named for name in names.split(",")}


@pytest.mark.parametrize("table", TABLES, ids=lambda path: path.name)
def test_rows_of_a_table_are_of_the_same_pictures_and_stand_in_the_results(table: Path) -> None:
    results = (DOCS / "results.md").read_text()
    rows = {path.stem: read_record(path) for path in sorted(table.glob("*.json"))}
    assert len(rows) > 1
    assert len({(row.reference.digest, row.sampling.count, tuple(row.sampling.size)) for row in rows.values()}) == 1
    for name, row in rows.items():
        assert "/" not in json.dumps(json.loads((table / f"{name}.json").read_text())["reference"]["source"])
        score = row.values["perceptual-darkroom"]
        assert f"| {score:.3f} " in results or f"**{score:.3f}" in results, f"{name}: {score:.4f} is not in results.md"
