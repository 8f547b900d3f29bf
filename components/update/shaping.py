"""Reward shaping by length (arXiv:2503.14476 section 3.4)."""

import numpy as np


def overlong_penalty(lengths_S: np.ndarray, max_completion_length: int, buffer: int) -> np.ndarray:
    """Soft over-length punishment, eq. 13: float64 (S,) in [-1, 0], to be added to the reward.

    0 up to `max_completion_length - buffer` tokens, falling linearly to -1 at `max_completion_length`. `buffer` 0
    switches it off.
    """
    lengths_S = np.asarray(lengths_S, dtype=np.float64)
    if buffer == 0:
        return np.zeros_like(lengths_S)
    if not 0 < buffer <= max_completion_length:
        raise ValueError(
            f"overlong_buffer must lie within 0..max_completion_length = {max_completion_length}, got {buffer}"
        )
    return np.clip((max_completion_length - buffer - lengths_S) / buffer, -1.0, 0.0)


def scored_lengths(lengths_S: np.ndarray, truncated_S: np.ndarray, mask_truncated: bool) -> np.ndarray:
    """Number of tokens of each completion the loss sees: 0 for one that hit the length limit, when those are masked."""
    return np.where(np.asarray(truncated_S, dtype=bool) & mask_truncated, 0, np.asarray(lengths_S))
