"""Which prompts an iteration samples: every prompt once an epoch, in an order of its own each epoch.

The order is a function of seed, epoch and prompt id alone, so every shard, restart and later run of a fine-tune
works it out for itself. An iteration that runs over the end of an epoch takes from the next one only prompts that it
does not have yet; those keep their place in that epoch.

# N train prompts, P prompts an iteration
"""

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from components.common.errors import DataError

if TYPE_CHECKING:
    import numpy as np

_MIX_1, _MIX_2, _STEP = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB, 0x9E3779B97F4A7C15  # SplitMix64


def choose(prompt_ids: Sequence[str], *, seed: int, num_prompts: int, iteration: int) -> list[int]:
    """Rows of the P prompts of an iteration of the fine-tune (counted from 0), in the order they are drawn.

    Raises:
        DataError: fewer prompts than an iteration takes.
    """
    import numpy as np

    check_enough(len(prompt_ids), num_prompts)
    keys_N = prompt_keys(prompt_ids)
    epoch, pending = _walk(keys_N, seed, num_prompts, iteration)
    if len(pending) < num_prompts:
        pending = np.concatenate(_over_the_end(keys_N, seed, num_prompts, epoch, pending)[0])
    return pending[:num_prompts].tolist()


def visits_before(keys_N: "np.ndarray", *, seed: int, num_prompts: int, iteration: int) -> "np.ndarray":
    """How often each prompt was drawn in the iterations before, int64 (N,)."""
    import numpy as np

    epoch, pending = _walk(keys_N, seed, num_prompts, iteration)
    visits_N = np.full(len(keys_N), epoch + 1, dtype=np.int64)
    visits_N[pending] = epoch
    return visits_N


def _walk(keys_N: "np.ndarray", seed: int, num_prompts: int, iteration: int) -> "tuple[int, np.ndarray]":
    """The epoch an iteration starts in, and that epoch's prompts that are still to be drawn, in their order."""
    import numpy as np

    epoch, pending = 0, np.argsort(ranks(keys_N, seed, 0), kind="stable")
    while True:
        whole = min(iteration, len(pending) // num_prompts)
        pending = pending[whole * num_prompts :]
        iteration -= whole
        if iteration == 0:
            return epoch, pending
        _, pending = _over_the_end(keys_N, seed, num_prompts, epoch, pending)
        epoch, iteration = epoch + 1, iteration - 1


def _over_the_end(
    keys_N: "np.ndarray", seed: int, num_prompts: int, epoch: int, pending: "np.ndarray"
) -> "tuple[tuple[np.ndarray, np.ndarray], np.ndarray]":
    """The iteration that takes the last prompts of an epoch and first others of the next; what the next has left."""
    import numpy as np

    following = np.argsort(ranks(keys_N, seed, epoch + 1), kind="stable")
    fresh = following[~np.isin(following, pending)][: num_prompts - len(pending)]
    return (pending, fresh), following[~np.isin(following, fresh)]


def check_enough(num_train: int, num_prompts: int, which: str = "train prompts") -> None:
    """Refuses an iteration that would need a prompt twice. Raises DataError."""
    if num_train < num_prompts:
        raise DataError(
            f"rollout.num_prompts = {num_prompts}, but there are {num_train} {which}: "
            f"set it to {num_train} or less, or bring more prompts"
        )


def share(rows: Sequence[int], shard: int, num_shards: int) -> list[int]:
    """A shard's part of an iteration's rows; the parts differ by one row at most.

    Raises:
        DataError: there is no such shard.
    """
    if not 0 <= shard < num_shards:
        raise DataError(f"shard {shard} of {num_shards}: shards are counted from 0 to {num_shards - 1}")
    return list(rows[shard::num_shards])


def prompt_keys(prompt_ids: Sequence[str]) -> "np.ndarray":
    """A number for each prompt id, uint64 (N,)."""
    import numpy as np

    digests = b"".join(hashlib.blake2b(name.encode(), digest_size=8).digest() for name in prompt_ids)
    return np.frombuffer(digests, dtype="<u8")


def ranks(keys_N: "np.ndarray", seed: int, epoch: "int | np.ndarray") -> "np.ndarray":
    """Place of each prompt within an epoch, uint64 (N,): SplitMix64 of key, seed and epoch."""
    import numpy as np

    with np.errstate(over="ignore"):
        base = int.from_bytes(hashlib.blake2b(f"prompts/{seed}".encode(), digest_size=8).digest(), "big")
        z_N = keys_N ^ np.uint64(base)
        z_N = z_N + (np.asarray(epoch, dtype=np.uint64) + np.uint64(1)) * np.uint64(_STEP)
        z_N = (z_N ^ (z_N >> np.uint64(30))) * np.uint64(_MIX_1)
        z_N = (z_N ^ (z_N >> np.uint64(27))) * np.uint64(_MIX_2)
        return z_N ^ (z_N >> np.uint64(31))
