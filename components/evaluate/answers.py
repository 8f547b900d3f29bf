"""The answer a completion gives, as text two completions can be compared by: what a majority vote counts.

Conventions, the first that applies: the first group of `pattern`; the last `\\boxed{...}`; the text after the last
`####`; the last number; the whole text.
Left out: mathematical equivalence (`1/2` and `0.5` are two answers here). Whether an answer is *right* is the reward's
word.
"""

import re
from decimal import Decimal, InvalidOperation

_NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|[-+]?\.\d+")
_BOXED = "\\boxed{"


def extract_answer(text: str, pattern: re.Pattern[str] | None = None) -> str:
    """The answer in `text` in one normal form (`1,200.0` is `1200`)."""
    if pattern is not None:
        matches = list(pattern.finditer(text))
        if matches:
            return _normal((matches[-1].group(1) or "") if pattern.groups else matches[-1].group())
    boxed = _last_boxed(text)
    if boxed is not None:
        return _normal(boxed)
    if "####" in text:
        return _normal(text.rsplit("####", 1)[1].strip().split("\n", 1)[0])
    numbers = _NUMBER.findall(text)
    return _normal(numbers[-1] if numbers else text)


def _last_boxed(text: str) -> str | None:
    """Content of the last complete `\\boxed{...}`, its braces balanced."""
    start = text.rfind(_BOXED)
    if start < 0:
        return None
    depth = 1
    for position in range(start + len(_BOXED), len(text)):
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if depth == 0:
            return text[start + len(_BOXED) : position]
    return None


def _normal(answer: str) -> str:
    answer = answer.strip().strip("$").strip().rstrip(".").strip()
    plain = answer.replace(",", "")
    if _NUMBER.fullmatch(plain) and len(plain) < 100:
        try:
            number = Decimal(plain)
        except InvalidOperation:  # model text is untrusted; what is no number stays text
            return answer
        return format(number.normalize() + 0, "f")
    return " ".join(answer.lower().split())
