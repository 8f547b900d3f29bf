"""The answer that a majority vote counts."""

import re

import pytest

from components.common.numbers import find_number
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
        ("9" * 4000 + "e999", "9" * 4000 + "e999"),
        ("10-3", "3"),
        ("#### 42 apples", "42"),
        ("#### forty two.", "forty two"),
        ("#### $1,234.50. Done", "1234.5"),
        ("1e3", "1000"),
        ("5% of them", "5"),
        ("1/2", "0.5"),
        ("a third: 2/6", "1/3"),
        (r"\boxed{1} #### 2", "2"),
        (r"\boxed{x = 1{,}200\text{ km}}", "1200"),
        (r"\boxed{$5.}", "5"),
        (r"\boxed{50\%}", "50"),
        (r"\boxed{7 km}", "7"),
        (r"\boxed{-\$5}", "-5"),
        (r"\boxed{2x}", "2x"),
        (r"\boxed{3 or 4}", "3 or 4"),
        (r"\boxed{10-3}", "10-3"),
        (r"\boxed{\sqrt{2}}", r"\sqrt{2}"),
    ],
)
def test_conventions(text, answer):
    assert extract_answer(text) == answer


TEXTS = ["12+30=42", "10-3", "#### 42 apples", "1e3", "it costs -$5", r"\boxed{17}", "3/4 of it", ".5", "H2O", "1,2,3"]


@pytest.mark.parametrize("text", TEXTS)
def test_two_texts_the_reward_finds_equal_are_one_answer(text):
    number = find_number(text)
    as_counted = extract_answer(text)
    assert number is None or find_number(as_counted) == number
    others = [other for other in TEXTS if extract_answer(other) == as_counted]
    assert all(find_number(other) == number for other in others)


def test_a_pattern_comes_first_and_its_last_match_counts():
    pattern = re.compile(r"<a>(.*?)</a>")
    assert extract_answer("<a>1</a> <a>2.0</a> 77", pattern) == "2"
    assert extract_answer("no tag 77", pattern) == "77"
    assert extract_answer("x is 5", re.compile(r"x is \d")) == "x is 5"
