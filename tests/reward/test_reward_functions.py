"""Each built-in reward function against expectations worked out by hand."""

from fractions import Fraction

import pytest

from components.common.numbers import find_number, last_boxed
from components.reward.functions.equivalence import math_verify
from components.reward.functions.formats import regex_format, think_format
from components.reward.functions.matching import exact_match, numeric_match
from components.reward.functions.penalties import length_penalty, repetition_penalty, soft_overlong


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("#### 72", 72),
        ("6 * 12 = 72\n#### 72.", 72),
        ("#### $1,234.50.", Fraction("1234.5")),
        ("#### 18 dollars a day, not 20", 18),
        ("#### 1\n#### 2", 2),
        ("####", None),
        ("no number here", None),
        ("so the answer is 5.", 5),
        ("12+30=42", 42),
        ("3 - 5 = -2", -2),
        ("10-5", 5),
        ("(1)-4", 4),
        ("x = \u22127", -7),
        ("it costs -$5", -5),
        ("it costs $-5", -5),
        ("it costs $ 5", 5),
        ("5% of them", 5),
        ("72 apples", 72),
        ("H2O", None),
        ("3/4 of it", Fraction(3, 4)),
        ("1/0", None),
        ("1e3", 1000),
        ("2.5E-1", Fraction(1, 4)),
        ("1e999999999", None),
        ("9" * 5000, None),
        ("1,2,3", 3),
        ("1{,}234", 1234),
        ("1,234,567 stars", 1234567),
        (".5", Fraction(1, 2)),
        (r"thus \boxed{17} and not 18", 17),
        (r"\boxed{x = 3}", 3),
        (r"\boxed{", None),
    ],
)
def test_the_number_a_text_states(text, number):
    assert find_number(text) == number


def test_conventions_are_kept_apart():
    text = r"\boxed{1} #### 2 and 3"
    assert [find_number(text, way) for way in ("hash", "boxed", "last", "auto")] == [2, 1, 3, 2]
    assert find_number("the answer is 3", "hash") is None
    assert find_number("the answer is 3", "boxed") is None
    assert last_boxed(r"\boxed{\frac{1}{2}} so \boxed{\sqrt{2}}") == r"\sqrt{2}"


def test_numeric_match():
    texts = ["#### 72", "72.0", "seventy-two", "73", "#### 1,000"]
    assert numeric_match(texts, ["72", 72, "72", 72.0, "1000"]) == [1, 1, 0, 0, 1]
    assert numeric_match(["3"], [None]) == [None]
    assert numeric_match(["0.333"], ["1/3"], tolerance=0.01) == [1]
    assert numeric_match(["0.333"], ["1/3"], tolerance=0.0001) == [0]
    with pytest.raises(ValueError, match="the answer holds no number: 'blue'; use exact_match or math_verify"):
        numeric_match(["3"], ["blue"])


def test_exact_match():
    texts = ["blue", " blue\n", "Blue", "it is blue", ""]
    assert exact_match(texts, ["blue"] * 5) == [1, 1, 0, 0, 0]
    assert exact_match(texts, ["blue"] * 5, ignore_case=True) == [1, 1, 1, 0, 0]
    assert exact_match(["answer: a, answer: b", "none"], ["b", "b"], pattern=r"answer: (\w)") == [1, 0]
    assert exact_match(["4", "5"], [4, None]) == [1, None]


def test_math_verify():
    half = r"\frac{1}{2}"
    texts = [r"so it is $\frac{2}{4}$", "0.5", r"\boxed{1/2}", "I do not know", r"$\frac{1}{3}$"]
    assert math_verify(texts, [half] * 5) == [1, 1, 1, 0, 0]
    assert math_verify([r"$\{1, 2\}$", r"$x + x$"], [r"$\{2, 1\}$", "2x"]) == [1, 1]
    assert math_verify(["3", "3"], ["3", None]) == [1, None]


def test_regex_format():
    pattern = r"<a>.+</a>"
    assert regex_format(["<a>x\ny</a>", "say <a>x</a>", "<a></a>"], pattern) == [1, 0, 0]
    assert regex_format(["<a>x\ny</a>", "say <a>x</a>", "<a></a>"], pattern, anywhere=True) == [1, 1, 0]


def test_think_format():
    good = "<think>two and two</think>four"
    bad = ["four", "<think></think>four", "<think>a</think>", "<think>a</think><think>b</think>c", "x<think>a</think>b"]
    assert think_format([good, f"  {good}\n", *bad]) == [1, 1, 0, 0, 0, 0, 0]
    assert think_format(["two and two</think>four", good], opened=True) == [1, 0]


def test_length_penalty():
    ids = [[0] * 10, [0] * 30, [0] * 500]
    assert length_penalty(ids, per_token=0.01, free_tokens=10) == pytest.approx([0, -0.2, -1])
    assert length_penalty(ids, per_token=0.01, free_tokens=10, floor=-0.1) == pytest.approx([0, -0.1, -0.1])
    with pytest.raises(ValueError, match="per_token must not be negative"):
        length_penalty(ids, per_token=-1)


def test_soft_overlong_is_equation_13_of_dapo():
    ids = [[0] * length for length in (0, 60, 70, 80, 100, 120)]
    assert soft_overlong(ids, max_length=100, cache_length=40) == pytest.approx([0, 0, -0.25, -0.5, -1, -1])
    with pytest.raises(ValueError, match="want 0 < cache_length <= max_length"):
        soft_overlong(ids, max_length=10, cache_length=20)


def test_repetition_penalty():
    # bigrams: 12 23 34 distinct; 55 four times; 12 21 12 21 of which two differ; none
    ids = [[1, 2, 3, 4], [5, 5, 5, 5, 5], [1, 2, 1, 2, 1], [7]]
    assert repetition_penalty(ids, ngram=2) == pytest.approx([0, -0.75, -0.5, 0])
    assert repetition_penalty(ids, ngram=2, max_penalty=-2) == pytest.approx([0, -1.5, -1, 0])


def test_repetition_penalty_agrees_with_trl():
    rewards = pytest.importorskip("trl.rewards", reason="TRL is installed for development only")
    ids = [[1, 2, 3, 4], [5] * 9, [1, 2, 1, 2, 1, 2, 3], [7], []]
    assert repetition_penalty(ids, ngram=3) == pytest.approx(rewards.get_repetition_penalty_reward(3, -1.0)(ids))


def test_soft_overlong_agrees_with_trl():
    rewards = pytest.importorskip("trl.rewards", reason="TRL is installed for development only")
    ids = [[0] * length for length in range(0, 130, 7)]
    theirs = rewards.get_soft_overlong_punishment(max_completion_len=100, soft_punish_cache=40)(completion_ids=ids)
    assert soft_overlong(ids, max_length=100, cache_length=40) == pytest.approx(theirs)
