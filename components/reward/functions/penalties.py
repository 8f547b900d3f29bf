"""Penalties, at most 0: for length, for running into the limit, for repetition.

# T tokens of a completion
"""


def length_penalty(
    completion_ids: list[list[int]], per_token: float = 0.001, free_tokens: int = 0, floor: float = -1.0
) -> list[float]:
    """-per_token for each token beyond `free_tokens`, never below `floor`."""
    _check(per_token >= 0, f"per_token must not be negative, got {per_token}")
    _check(floor <= 0, f"floor must not be positive, got {floor}")
    return [max(floor, -per_token * max(0, len(ids_T) - free_tokens)) for ids_T in completion_ids]


def soft_overlong(completion_ids: list[list[int]], max_length: int, cache_length: int) -> list[float]:
    """Soft overlong punishment of DAPO (arXiv:2503.14476, equation 13).

    0 up to max_length - cache_length tokens, then falling evenly to -1 at max_length, and -1 beyond.
    """
    _check(0 < cache_length <= max_length, f"want 0 < cache_length <= max_length, got {cache_length} and {max_length}")
    start = max_length - cache_length
    return [-min(1.0, max(0, len(ids_T) - start) / cache_length) for ids_T in completion_ids]


def repetition_penalty(completion_ids: list[list[int]], ngram: int = 3, max_penalty: float = -1.0) -> list[float]:
    """max_penalty × (1 - distinct n-grams / n-grams), over tokens (arXiv:2502.03373, appendix C.2).

    0 for a completion of fewer than `ngram` tokens.
    """
    _check(ngram >= 1, f"ngram must be at least 1, got {ngram}")
    _check(max_penalty <= 0, f"max_penalty must not be positive, got {max_penalty}")
    return [max_penalty * _repeated_share(ids_T, ngram) for ids_T in completion_ids]


def _repeated_share(ids_T: list[int], ngram: int) -> float:
    count = len(ids_T) - ngram + 1
    if count < 1:
        return 0.0
    distinct = {tuple(ids_T[start : start + ngram]) for start in range(count)}
    return 1.0 - len(distinct) / count


def _check(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(message)
