"""Names of reward functions: the built-in ones, and the nearest to a misspelt one."""

import difflib
from collections.abc import Collection

BUILT_IN = {
    "exact_match": "components.reward.functions.matching:exact_match",
    "numeric_match": "components.reward.functions.matching:numeric_match",
    "math_verify": "components.reward.functions.equivalence:math_verify",
    "regex_format": "components.reward.functions.formats:regex_format",
    "think_format": "components.reward.functions.formats:think_format",
    "length_penalty": "components.reward.functions.penalties:length_penalty",
    "repetition_penalty": "components.reward.functions.penalties:repetition_penalty",
    "soft_overlong": "components.reward.functions.penalties:soft_overlong",
}
"""Built-in reward functions: name → where it is defined."""


def nearest(name: str, known: Collection[str]) -> str:
    """`; did you mean …?` for a misspelt name, or the names there are when none is near."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if near:
        return f"; did you mean {near[0]}?"
    return f"; there are {', '.join(sorted(known))}" if known else ""
