"""Finds the number an answer states, by the conventions answers are written in."""

import re
from fractions import Fraction
from typing import Literal

Convention = Literal["auto", "hash", "boxed", "last"]

NUMBER = re.compile(
    r"(?P<sign>(?<![\w)\]}])[-+\u2212])?"  # a minus behind a digit or a bracket subtracts
    r"(?:\\?[$€£¥]\s?(?P<inner>[-+\u2212])?)?"  # -$5 and $-5
    r"(?<![\w.])"  # the 2 of H2O is no answer
    r"(?P<number>\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)"
    r"(?P<exponent>[eE][-+]?\d+)?"
    r"(?:/(?P<denominator>\d+))?"
)
UNIT = re.compile(r"(?:\s|\\[,;!% ]|[%°$.]|\\(?:text|mathrm|mbox)\{[^{}]*\}|(?<=\s)[A-Za-z]+)*")
HASHES = "####"
MAX_EXPONENT_LENGTH = 4
"""Characters; a longer exponent would be worked out to as many digits as it says."""


def find_number(text: str, convention: Convention = "auto") -> Fraction | None:
    r"""The number that `text` answers with, exactly; None when it states none.

    `hash`: the first number behind the last `####` (GSM8K); `boxed`: the last number in the last `\boxed{...}`;
    `last`: the last number at all; `auto`: the first of these three whose mark the text has. Thousands commas,
    currency signs, units, percent signs and a trailing period do not matter; `3/4` is a fraction.
    """
    if convention == "auto":
        convention = "hash" if HASHES in text else "boxed" if r"\boxed" in text else "last"
    if convention == "hash":
        _, mark, behind = text.rpartition(HASHES)
        return _first(behind) if mark else None
    if convention == "boxed":
        inside = last_boxed(text)
        return None if inside is None else _last(inside)
    return _last(text)


def lone_number(text: str) -> Fraction | None:
    r"""The number that `text` is, whatever stands before `=` and a unit behind it aside; None when it is more.

    `x = 1,200 \text{ km}` is 1200, `$5.` is 5; `\frac{1}{2}`, `2x` and `3 or 4` are more than a number.
    """
    plain = _plain(text).rpartition("=")[2].strip().removesuffix("$").strip()
    match = NUMBER.match(plain) or NUMBER.match(plain.removeprefix("$").strip())
    return _value(match) if match and UNIT.fullmatch(match.string, match.end()) else None


def last_boxed(text: str) -> str | None:
    r"""What stands in the last `\boxed{...}`, braces inside balanced; None when there is none or it is not closed."""
    start = text.rfind(r"\boxed{")
    if start < 0:
        return None
    start += len(r"\boxed{")
    depth = 1
    for position in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if depth == 0:
            return text[start:position]
    return None


def _first(text: str) -> Fraction | None:
    match = NUMBER.search(_plain(text))
    return _value(match) if match else None


def _last(text: str) -> Fraction | None:
    matches = list(NUMBER.finditer(_plain(text)))
    return _value(matches[-1]) if matches else None


def _plain(text: str) -> str:
    return text.replace("{,}", ",").replace(r"\!", "")  # LaTeX thousands


def _value(match: re.Match[str]) -> Fraction | None:
    if len(match["exponent"] or "") > MAX_EXPONENT_LENGTH:
        return None
    negative = (match["sign"] or match["inner"] or "+") != "+"
    try:
        value = Fraction(match["number"].replace(",", "") + (match["exponent"] or ""))
        if match["denominator"]:
            value /= int(match["denominator"])
    except (ValueError, ZeroDivisionError):  # thousands of digits, or x/0: no answer anyone meant
        return None
    return -value if negative else value
