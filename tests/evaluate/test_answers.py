"""The answer that a majority vote counts."""

import re

import pytest

from components.evaluate.answers import extract_answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("12 + 30 = 42", "42"),
        ("it costs $1,200.50 in all.", "1200.5"),
        ("so 007.0", "7"),
        ("-3", "-3"),
        ("first 5\n#### 1,234\nthen 9", "1234"),
        (r"2 and 3, hence \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{4} no, \boxed{ 5 }", "5"),
        (r"unfinished \boxed{4", "4"),
        ("  Yes,  SURE ", "yes, sure"),
        ("", ""),
        ("#### ", ""),
        ("9" * 500, "9" * 500),
    ],
)
def test_conventions(text, answer):
    assert extract_answer(text) == answer


def test_a_pattern_comes_first_and_its_last_match_counts():
    pattern = re.compile(r"<a>(.*?)</a>")
    assert extract_answer("<a>1</a> <a>2.0</a> 77", pattern) == "2"
    assert extract_answer("no tag 77", pattern) == "77"
    assert extract_answer("x = 5", re.compile(r"x = \d")) == "x = 5"
