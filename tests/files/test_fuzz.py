"""Hundreds of directories with one fault each: every command ends in time, with one line and a documented exit code, not 0."""

import pytest
from hostile import CODES, SECONDS, count

CASES = 50  #: in each part, about a second


@pytest.mark.parametrize("part", range(6))
def test_whatever_is_wrong_is_said_in_a_line(part, monkeypatch):
    monkeypatch.delenv("QKIT_DEBUG", raising=False)
    found, wrong = count(part * CASES, (part + 1) * CASES)
    assert wrong == []
    assert sum(found[f"exit {code}"] for code in CODES) == CASES
    assert SECONDS <= 10
