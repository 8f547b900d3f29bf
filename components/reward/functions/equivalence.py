"""Reward for a mathematically equal answer, judged by math-verify (symbolic, LaTeX and plain expressions).

math-verify bounds its own work with `signal.alarm`, which needs the main thread; reward workers run functions there.
"""

from typing import Any


def math_verify(completions: list[str], answer: list[Any], seconds: int = 3) -> list[float | None]:
    """1 when the completion's last expression equals the answer, else 0; none where the answer cannot be parsed.

    `seconds`: longest that parsing, and comparing, may take; a completion that needs more scores 0. Three of these fit
    into the stage's default `timeout_seconds`.
    """
    return [_equal(completion, truth, seconds) for completion, truth in zip(completions, answer, strict=True)]


def _equal(completion: str, truth: Any, seconds: int) -> float | None:
    from math_verify import parse, verify

    if truth is None:
        return None
    want = parse(_as_latex(str(truth)), parsing_timeout=seconds, raise_on_error=False)
    if not want:
        return None
    got = parse(completion, parsing_timeout=seconds, raise_on_error=False)
    return float(bool(got) and verify(want, got, timeout_seconds=seconds, raise_on_error=False))


def _as_latex(truth: str) -> str:
    """A bare answer becomes LaTeX: math-verify reads LaTeX between delimiters only."""
    return truth if any(mark in truth for mark in ("$", r"\boxed", r"\(", r"\[")) else f"${truth}$"
