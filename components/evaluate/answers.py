"""The answer a completion gives, as text two completions can be compared by: what a majority vote counts.

Conventions, the first that applies: the first group of `pattern`; what follows the last `####`; the last
`\\boxed{...}`; the last number; the whole text. Numbers are found as the reward `numeric_match` finds them, and equal
ones are one answer (`1/2` and `0.5`).
Left out: equality of other expressions (`2x` and `x+x` are two answers here). Whether an answer is *right* is the
reward's word.
"""

import decimal
import re
from fractions import Fraction

from components.common.numbers import HASHES, find_number, last_boxed, lone_number

DECIMAL_DIGITS = 50
"""A number of more digits than a decimal of this length holds is written as a fraction."""


def extract_answer(text: str, pattern: re.Pattern[str] | None = None) -> str:
    """The answer in `text` in one normal form (`1,200.0` is `1200`)."""
    if pattern is not None:
        matches = list(pattern.finditer(text))
        if matches:
            return _normal((matches[-1].group(1) or "") if pattern.groups else matches[-1].group())
    if HASHES in text:
        line = text.rpartition(HASHES)[2].strip().partition("\n")[0]
        return _written(find_number(text, "hash"), line)
    boxed = last_boxed(text)
    if boxed is not None:
        return _normal(boxed)
    return _written(find_number(text, "last"), text)


def _normal(answer: str) -> str:
    return _written(lone_number(answer), answer)


def _written(number: Fraction | None, text: str) -> str:
    if number is not None:
        try:
            return _decimal(number)
        except ValueError:  # too many digits for Python to write down: no number anyone meant
            pass
    return " ".join(text.strip().strip("$").strip().rstrip(".").lower().split())


def _decimal(number: Fraction) -> str:
    """`1200.5`; a number that no decimal is stays a fraction, `1/3`."""
    with decimal.localcontext(prec=DECIMAL_DIGITS) as context:
        context.traps[decimal.Inexact] = True
        try:
            return format((decimal.Decimal(number.numerator) / number.denominator).normalize(), "f")
        except decimal.Inexact:
            return str(number)
