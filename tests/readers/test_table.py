"""The table of docs/evidence/readers.md is the one that `make test-readers` measured, and nothing in it is wrong."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import records
import table

from recipes import MODELS, READERS, RECIPES

ROWS = records.load()


def faults(rows):
    """The rows whose inputs are not those of the others, or which say something else than their run did."""
    found = [key for key, row in rows.items() if records.sealed(row) != row]
    for names in (("model", "weights"), ("model", "recipe", "layout", "opened")):
        groups = {}
        for key, row in rows.items():
            layout = {"layout": READERS[row["reader"]].layout}
            *group, digest = ((row | layout)[name] for name in names)
            if digest:
                groups.setdefault(tuple(group), {}).setdefault(digest, []).append(key)
        for digests in groups.values():
            fewest = sorted(digests.values(), key=len)[:-1]
            found += [key for keys in fewest for key in keys]
    return found


def test_the_page_has_the_measured_rows():
    page = table.PAGE.read_text()
    assert page.partition(table.BEGIN)[2].partition(table.END)[0] == table.table()


def test_every_row_is_of_the_same_models_and_as_its_run_wrote_it():
    assert faults(ROWS) == []


@pytest.mark.parametrize(
    "change", [{"weights": "0" * 16}, {"opened": "1" * 16}, {"error": "refused"}, {"far": 0.0}, {"seal": ""}]
)
def test_a_row_of_another_model_or_by_hand_is_found(change):
    key = ("llama", "int4-g64", "vLLM on a CPU")
    changed = ROWS[key] | change
    if {"weights", "opened"} & set(change):
        changed = records.sealed(changed)  # of a whole run, from another model
    assert faults({**ROWS, key: changed}) == [key]


@pytest.mark.parametrize("reader", READERS)
def test_the_scripts_of_a_reader_are_those_that_ran(reader):
    assert {row["script"] for row in ROWS.values() if row["reader"] == reader} == {records.script(READERS[reader])}


def test_every_row_of_the_table_was_run():
    assert set(ROWS) == set(records.all_keys())


def test_a_row_without_a_result_is_named(monkeypatch):
    fewer = {key: row for key, row in ROWS.items() if key != ("llama", "int4-g32", "mlx-lm")}
    monkeypatch.setattr(records, "load", lambda: fewer)
    assert "\nNot run: llama in mlx-lm under int4-g32.\n" in table.table()


def test_every_measured_row_is_equal_to_the_law_or_a_known_refusal():
    assert ROWS
    assert not [key for key, row in ROWS.items() if records.verdict(row).startswith("WRONG")]


@pytest.mark.parametrize("key", [key for key, row in ROWS.items() if "error" in row][::7], ids=" ".join)
def test_an_error_of_another_kind_is_no_known_refusal(key):
    assert records.verdict(ROWS[key]).startswith("refused")
    assert records.verdict({**ROWS[key], "error": "RuntimeError: out of memory"}).startswith("WRONG")


def test_the_page_names_every_model():
    assert {key[0] for key in ROWS} == set(MODELS)
    assert {key[1] for key in ROWS} == set(RECIPES)
