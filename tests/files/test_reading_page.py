"""The page of sources agrees with the code."""

from reading import PAGE, page


def test_the_page_is_that_of_the_code():
    assert PAGE.read_text(encoding="utf-8") == page()  # python tests/reading.py writes it anew
