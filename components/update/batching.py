"""From scored rollouts to micro-batches, on the host, before any model is loaded.

    S  completions (sequences)      N  completion tokens      R  reward functions
    W  ranks (processes)            T  tokens a model reads in one micro-batch

    table → Batch (arrays)  → advantages, groups without a signal dropped  → Plan: optimizer steps of micro-batches

A sequence of p prompt and c completion tokens costs the model p + c - 1: nothing is predicted from its last token.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from components.common import scored
from components.common.errors import DataError
from components.common.records import REWARD_PREFIX

if TYPE_CHECKING:
    import pyarrow as pa

COLUMNS = ("prompt_id", "sample_index", "prompt_ids", "completion_ids", "logprobs", "finish_reason", "policy_digest")


@dataclass(frozen=True)
class Batch:
    """All sampled sequences of an iteration; ragged columns are flat, with S + 1 offsets."""

    prompt_ids: np.ndarray
    """int32, prompts one after another."""
    prompt_offsets: np.ndarray
    completion_ids: np.ndarray
    """int32 (N,)."""
    completion_offsets: np.ndarray
    behaviour_logprobs: np.ndarray
    """float32 (N,): the sampler's own log-probability of each completion token, nats."""
    group: np.ndarray
    """int64 (S,): which prompt."""
    truncated: np.ndarray
    """bool (S,): hit the length limit."""
    rewards: np.ndarray
    """float64 (S, R): the weighted total alone, or a column a function; NaN: none."""
    advantages: np.ndarray
    """float64 (S,)."""
    scored_lengths: np.ndarray
    """int64 (S,): completion tokens the loss sees; 0: masked."""
    keep: np.ndarray
    """bool (S,): reaches the model."""

    @property
    def prompt_lengths(self) -> np.ndarray:
        """int64 (S,)."""
        return np.diff(self.prompt_offsets)

    @property
    def completion_lengths(self) -> np.ndarray:
        """int64 (S,)."""
        return np.diff(self.completion_offsets)

    @property
    def model_lengths(self) -> np.ndarray:
        """int64 (S,): tokens the model reads."""
        return self.prompt_lengths + self.completion_lengths - 1

    def save(self, path: Path) -> None:
        """Writes the arrays, for the worker processes."""
        np.savez(path, **{field.name: getattr(self, field.name) for field in fields(self)})

    @classmethod
    def load(cls, path: Path) -> "Batch":
        """Reads what `save` wrote."""
        with np.load(path, allow_pickle=False) as arrays:
            return cls(**{field.name: arrays[field.name] for field in fields(cls)})


@dataclass(frozen=True)
class Step:
    """One optimizer step: the micro-batches of each rank, as many on each, and the sizes that normalise its loss."""

    ranks: list[list[np.ndarray]]
    """[rank][micro-batch] → sequence numbers; an empty one keeps ranks in step."""
    members: np.ndarray
    """Every sequence the step's normaliser counts, dropped ones included."""


def read_batch(folder: Path, *, policy_digests: Sequence[str], vocabulary_size: int, reward_columns: bool) -> Batch:
    """Reads the training split of a scored artifact; `advantages` and `keep` are still those of no signal.

    `policy_digests`: the policy to update, then others that may have sampled. `reward_columns`: rewards a function
    rather than their weighted total.

    Raises:
        DataError: columns missing, log-probabilities of the wrong length, tokens outside the vocabulary, rewards of
            other completions, or completions of a policy that is not among `policy_digests`.
    """
    table = _read_table(folder, reward_columns)
    _check_policy(table.column("policy_digest").to_pylist(), policy_digests)
    prompt_ids, prompt_offsets = _ragged(table, "prompt_ids")
    completion_ids, completion_offsets = _ragged(table, "completion_ids")
    logprobs, logprob_offsets = _ragged(table, "logprobs")
    keys = list(zip(table.column("prompt_id").to_pylist(), table.column("sample_index").to_pylist(), strict=True))
    _check_lengths(keys, completion_offsets, logprob_offsets, prompt_offsets)
    _check_vocabulary(keys, vocabulary_size, (prompt_ids, prompt_offsets), (completion_ids, completion_offsets))
    numbers = {name: number for number, name in enumerate(dict.fromkeys(name for name, _ in keys))}
    rewards = [REWARD_PREFIX + name for name in scored.function_columns(table)] if reward_columns else ["reward"]
    return Batch(
        prompt_ids=prompt_ids, prompt_offsets=prompt_offsets,
        completion_ids=completion_ids, completion_offsets=completion_offsets,
        behaviour_logprobs=logprobs.astype(np.float32),
        group=np.array([numbers[name] for name, _ in keys], dtype=np.int64),
        truncated=np.array([reason == "length" for reason in table.column("finish_reason").to_pylist()], dtype=bool),
        rewards=np.stack([_numbers(table, name) for name in rewards], axis=1),
        advantages=np.zeros(len(keys)), scored_lengths=np.diff(completion_offsets),
        keep=np.zeros(len(keys), dtype=bool),
    )  # fmt: skip


def plan_steps(
    batch: Batch,
    *,
    num_epochs: int,
    num_minibatches: int,
    num_ranks: int,
    max_tokens: int,
    seed: int,
    padded: bool = False,
) -> list[Step]:
    """Optimizer steps of the whole iteration; the same on every rank.

    Groups with a signal are dealt evenly to the minibatches of an epoch, and so are those without one, which only
    count in the normaliser. With fewer groups than minibatches there are fewer steps.
    """
    random = np.random.default_rng(seed)
    with_signal = np.unique(batch.group[batch.keep])
    without = np.setdiff1d(np.unique(batch.group), with_signal)
    num_steps = min(num_minibatches, len(with_signal))
    steps = []
    for _ in range(num_epochs if num_steps else 0):
        dealt = [np.array_split(random.permutation(part), num_steps) for part in (with_signal, without)]
        for groups in zip(*dealt, strict=True):
            members = np.flatnonzero(np.isin(batch.group, np.concatenate(groups)))
            kept = members[batch.keep[members]]
            micro_batches = cut(kept, batch.model_lengths[kept], max_tokens, multiple=num_ranks, padded=padded)
            steps.append(Step(deal(micro_batches, batch.model_lengths, num_ranks), members))
    return steps


def cut(
    sequences: np.ndarray, lengths: np.ndarray, max_tokens: int, *, multiple: int = 1, padded: bool = False
) -> list[np.ndarray]:
    """Cuts sequences, longest first, into micro-batches of at most `max_tokens`, of sizes as even as can be.

    The number of micro-batches is the smallest multiple of `multiple` that the budget allows; the last ones may be
    empty. Neighbours have like lengths, so little is padded. A sequence above the budget is a micro-batch of its own.
    """
    order = np.argsort(-lengths, kind="stable")
    sequences, lengths = sequences[order], lengths[order]
    count = -(-len(_fill(lengths, max_tokens, padded)) // multiple) * multiple
    low, high = max(int(lengths.max(initial=1)), -(-int(lengths.sum()) // max(count, 1))), max_tokens
    while low < high:  # the smallest budget that needs no more micro-batches
        middle = (low + high) // 2
        low, high = (low, middle) if len(_fill(lengths, middle, padded)) <= count else (middle + 1, high)
    ends = _fill(lengths, max(low, 1) if low <= max_tokens else max_tokens, padded)
    parts = [sequences[start:end] for start, end in zip([0, *ends], ends, strict=False)]
    return parts + [sequences[:0]] * (count - len(parts))


def deal(micro_batches: list[np.ndarray], lengths: np.ndarray, num_ranks: int) -> list[list[np.ndarray]]:
    """Deals micro-batches to ranks, as many to each, the heaviest first and to and fro so that loads are even."""
    heaviest_first = sorted(micro_batches, key=lambda part: -int(lengths[part].sum()))
    ranks: list[list[np.ndarray]] = [[] for _ in range(num_ranks)]
    for start in range(0, len(heaviest_first), num_ranks):
        row = heaviest_first[start : start + num_ranks]
        for rank, part in zip(range(num_ranks), row if (start // num_ranks) % 2 == 0 else reversed(row), strict=True):
            ranks[rank].append(part)
    return ranks


def _fill(lengths: np.ndarray, budget: int, padded: bool) -> list[int]:
    """Ends of the micro-batches when sequences, longest first, are filled in one after another."""
    ends: list[int] = []
    used = start = 0
    for position, length in enumerate(lengths.tolist()):
        cost = int(lengths[start]) * (position - start + 1) if padded else used + length
        if position > start and cost > budget:
            ends.append(position)
            start, used = position, 0
        used += length
    return [*ends, len(lengths)] if len(lengths) else []


def _read_table(folder: Path, reward_columns: bool) -> "pa.Table":
    """Completions beside their rewards; text and ground truth are not read."""
    table = scored.read_scored(folder, "train", None if reward_columns else [*COLUMNS, "reward"])
    if table is None:
        raise DataError("the scored rollout has no training completions: it was sampled for evaluation only")
    missing = [name for name in COLUMNS if name not in table.column_names]
    if missing:
        raise DataError(f"completions have no column {', '.join(missing)}; sample the iteration again")
    return table


def _ragged(table: "pa.Table", name: str) -> tuple[np.ndarray, np.ndarray]:
    """Flat values and S + 1 offsets of a list column."""
    column = table.column(name).combine_chunks()
    if column.null_count:
        raise DataError(f"column {name} has {column.null_count} empty cells; sample the iteration again")
    offsets = np.asarray(column.offsets, dtype=np.int64)
    return np.asarray(column.flatten()), offsets - offsets[0]


def _numbers(table: "pa.Table", name: str) -> np.ndarray:
    """A reward column; null is NaN."""
    return np.asarray(table.column(name).to_numpy(zero_copy_only=False), dtype=np.float64)


def _check_policy(digests: list[str], allowed: Sequence[str]) -> None:
    strange = sorted(set(digests) - set(allowed))
    if strange:
        share = sum(digest in strange for digest in digests) / len(digests)
        raise DataError(
            f"{share:.0%} of the completions were sampled by policy {strange[0]}, the one to update is {allowed[0]}; "
            "sample from that policy, or set staleness = 1 when the sampler is one update behind"
        )


def _check_lengths(keys: list, completions: np.ndarray, logprobs: np.ndarray, prompts: np.ndarray) -> None:
    wrong = np.flatnonzero(np.diff(completions) != np.diff(logprobs))
    if len(wrong):
        (name, sample), row = keys[int(wrong[0])], int(wrong[0])
        tokens, numbers = int(np.diff(completions)[row]), int(np.diff(logprobs)[row])
        raise DataError(
            f"{len(wrong)} completions have not one log-probability a token: prompt {name!r} sample {sample} has "
            f"{tokens} tokens and {numbers} log-probabilities; sample the iteration again"
        )
    empty = np.flatnonzero(np.diff(prompts) == 0)
    if len(empty):
        raise DataError(f"prompt {keys[int(empty[0])][0]!r} has no tokens; nothing can be predicted from it")


def _check_vocabulary(keys: list, size: int, *columns: tuple[np.ndarray, np.ndarray]) -> None:
    for values, offsets in columns:
        outside = np.flatnonzero((values < 0) | (values >= size))
        if len(outside):
            row = int(np.searchsorted(offsets, outside[0], side="right")) - 1
            raise DataError(
                f"prompt {keys[row][0]!r} has token {values[outside[0]]}, the policy's vocabulary has {size}; "
                "dataset, rollout and update must use one model's tokenizer"
            )
