"""The table of docs/readers.md is the one that `make test-readers` measured, and nothing in it is wrong."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import table

from recipes import READERS, RECIPES

ROWS = json.loads(table.RESULTS.read_text())


def test_the_page_has_the_measured_rows():
    page = table.PAGE.read_text()
    assert page.partition(table.BEGIN)[2].partition(table.END)[0] == table.table()


def test_a_row_without_a_result_is_named(monkeypatch, tmp_path):
    fewer = [row for row in ROWS if row[:3] != ["llama", "int4-g32", "mlx-lm"]]
    (tmp_path / "results.json").write_text(json.dumps(fewer))
    monkeypatch.setattr(table, "RESULTS", tmp_path / "results.json")
    assert "\nNot run: llama in mlx-lm under int4-g32.\n" in table.table()


def test_every_measured_row_is_equal_to_the_law_or_a_known_refusal():
    assert ROWS
    assert not [row for row in ROWS if row[3].startswith("WRONG")]


@pytest.mark.parametrize("reader", sorted({row[2] for row in ROWS}))
def test_every_reader_of_the_table_opens_what_it_was_tried_on(reader):
    assert reader in READERS
    assert {row[1] for row in ROWS if row[2] == reader} <= set(RECIPES)
    assert any(row[2] == reader and row[3][0].isdigit() for row in ROWS)
