"""Rewards for a known answer: the same text, or the same number."""

import re
from typing import Any

from components.common.numbers import Convention, find_number


def exact_match(
    completions: list[str], answer: list[Any], pattern: str | None = None, ignore_case: bool = False
) -> list[float | None]:
    """1 when the completion is the answer, surrounding white space aside, else 0; none where there is no answer.

    With `pattern`, a regular expression, the last text it finds is compared instead: its first group, if it has one.
    """
    compiled = re.compile(pattern) if pattern is not None else None
    scores: list[float | None] = []
    for completion, truth in zip(completions, answer, strict=True):
        if truth is None:
            scores.append(None)
            continue
        want, got = str(truth).strip(), _extract(completion, compiled).strip()
        same = got.casefold() == want.casefold() if ignore_case else got == want
        scores.append(float(same))
    return scores


def _extract(completion: str, pattern: re.Pattern[str] | None) -> str:
    if pattern is None:
        return completion
    found = list(pattern.finditer(completion))
    return (found[-1][1 if pattern.groups else 0] or "") if found else ""


def numeric_match(
    completions: list[str], answer: list[Any], convention: Convention = "auto", tolerance: float = 0.0
) -> list[float | None]:
    r"""1 when the completion states the answer's number, else 0; none where there is no answer.

    `convention`: `hash` (behind `####`), `boxed`, `last` (number of the text) or `auto`, the first that is there.
    `tolerance`: largest difference, relative to the answer, that still counts; 0 wants the very number.
    """
    return [_same_number(*pair, convention, tolerance) for pair in zip(completions, answer, strict=True)]


def _same_number(completion: str, truth: Any, convention: Convention, tolerance: float) -> float | None:
    if truth is None:
        return None
    want = find_number(str(truth))
    if want is None:
        raise ValueError(f"the answer holds no number: {str(truth)[:80]!r}; use exact_match or math_verify")
    got = find_number(completion, convention)
    return float(got is not None and abs(got - want) <= abs(want) * tolerance)
