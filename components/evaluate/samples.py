"""Which completions the report shows, and what it says of each.

# S samples (rows of a scored table), G samples of one prompt (a group)
"""

import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.common.errors import SettingsError
from components.common.records import MESSAGES, REWARD_PREFIX, completion_fields, iter_groups
from components.common.scored import completion_files, function_columns, read_scored, rewards_file
from components.evaluate.answers import extract_answer
from components.evaluate.metrics import Samples

if TYPE_CHECKING:
    import pyarrow as pa

UNREAD = {"logprobs", "prompt_ids", MESSAGES}
"""Columns nobody here looks at, and the largest."""
ADVANTAGE_EPSILON = 1e-4
"""Added to the standard deviation of a group, as TRL does."""
Row = dict[str, Any]


@dataclass(frozen=True)
class Table:
    """A scored table with what every use of it needs, worked out once; lists have one entry a row."""

    split: str
    table: "pa.Table"
    groups: list[tuple[int, int]]
    lengths: list[int]
    truncated: list[bool]
    rewards: list[float | None]
    right: list[bool]
    advantages: list[float | None]
    pattern: re.Pattern[str] | None


def read(
    folder: Path, split: str, *, correct_reward: str | None, threshold: float, pattern: str | None
) -> Table | None:
    """The scored rows of a split; None when it has none.

    Raises:
        SettingsError: `correct_reward` names no function of this table.
    """
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    files = completion_files((path.name for path in folder.iterdir()), split)
    if not files:
        return None
    names = {name for file in [*files, rewards_file(split)] for name in pq.read_schema(folder / file).names}
    table = read_scored(folder, split, columns=sorted(names - UNREAD))
    if table is None or table.num_rows == 0:
        return None
    judge = REWARD_PREFIX + judge_of(function_columns(table), correct_reward)
    groups, rewards = list(iter_groups(table)), table.column("reward").to_pylist()
    return Table(
        split=split,
        table=table,
        groups=groups,
        lengths=pc.list_value_length(table.column("completion_ids")).to_pylist(),
        truncated=[reason == "length" for reason in table.column("finish_reason").to_pylist()],
        rewards=rewards,
        right=[value is not None and value >= threshold - 1e-9 for value in table.column(judge).to_pylist()],
        advantages=[value for start, end in groups for value in group_advantages(rewards[start:end])],
        pattern=re.compile(pattern) if pattern else None,
    )


def judge_of(functions: Sequence[str], correct_reward: str | None) -> str:
    """The reward function that says what is right: the one named, else the first.

    Raises:
        SettingsError: none of that name was applied.
    """
    if correct_reward is None and functions:
        return functions[0]
    if correct_reward not in functions:
        known = ", ".join(functions) or "none"
        raise SettingsError(
            f"evaluate.correct_reward: want one of the reward functions ({known}), got {correct_reward!r}"
        )
    return correct_reward


def group_advantages(rewards_G: Sequence[float | None]) -> list[float | None]:
    """(reward - mean) / (standard deviation + 1e-4) of a group, over the samples that have a reward.

    DeepSeekMath (arXiv:2402.03300, section 4.1.2), with the sample standard deviation as TRL has it. A group of one has
    no baseline: None.
    """
    known = [reward for reward in rewards_G if reward is not None]
    if len(known) < 2:
        return [None] * len(rewards_G)
    mean = sum(known) / len(known)
    deviation = (sum((reward - mean) ** 2 for reward in known) / (len(known) - 1)) ** 0.5
    return [None if reward is None else (reward - mean) / (deviation + ADVANTAGE_EPSILON) for reward in rewards_G]


def prompts_of(scored: Table) -> list[Samples]:
    """The table as the metrics want it: one entry a prompt."""
    ids = scored.table.column("prompt_id").to_pylist()
    texts = scored.table.column("completion").to_pylist()
    found: dict[str, list[int]] = {}
    for start, end in scored.groups:
        found.setdefault(ids[start], []).extend(range(start, end))
    return [
        Samples(
            prompt_id=name,
            right=[scored.right[i] for i in rows],
            answers=[extract_answer(texts[i] or "", scored.pattern) for i in rows],
            lengths=[scored.lengths[i] for i in rows],
            truncated=[scored.truncated[i] for i in rows],
            rewards=[scored.rewards[i] for i in rows],
        )
        for name, rows in found.items()
    ]


def choose(scored: Table, count: int, *, seed: int, prefer: frozenset[str] = frozenset()) -> list[int]:
    """Up to `count` rows: a third the best, a third the worst, a third between, prompts of `prefer` first.

    Best and worst take one sample of each prompt before a second of any. The three kinds alternate, so that any first
    part of the list is as mixed as the whole.
    """
    ids = scored.table.column("prompt_id").to_pylist()
    depth = [position for start, end in scored.groups for position in range(end - start)]
    worth = [float("-inf") if reward is None else reward for reward in scored.rewards]
    rank = _rank_in_group(scored, worth)
    rows = range(len(ids))
    best = sorted(rows, key=lambda i: (rank[i][0], -worth[i], i))
    worst = sorted(rows, key=lambda i: (rank[i][1], worth[i], i))
    rng = random.Random(seed)
    chance = [rng.random() for _ in rows]
    between = sorted(rows, key=lambda i: (ids[i] not in prefer, depth[i], chance[i]))
    chosen: dict[int, None] = {}
    for trio in zip(best, worst, between, strict=True):
        for row in trio:
            if len(chosen) < count:
                chosen.setdefault(row)
    return list(chosen)


def _rank_in_group(scored: Table, worth: Sequence[float]) -> list[tuple[int, int]]:
    """Place of each sample within its group: counted from the best, and from the worst."""
    ranks: list[tuple[int, int]] = []
    for start, end in scored.groups:
        order = sorted(range(start, end), key=lambda i: -worth[i])
        place = {row: position for position, row in enumerate(order)}
        ranks += [(place[i], end - start - 1 - place[i]) for i in range(start, end)]
    return ranks


def rows(scored: Table, chosen: Sequence[int], *, iteration: int, characters: int) -> list[Row]:
    """What the report says of each chosen row."""
    if not chosen:
        return []
    known = {
        *completion_fields(),
        "reward",
        "error",
        *(REWARD_PREFIX + name for name in function_columns(scored.table)),
    }
    truths = [name for name in scored.table.column_names if name not in known]
    functions = function_columns(scored.table)
    found = []
    for i, values in zip(chosen, scored.table.take(list(chosen)).to_pylist(), strict=True):
        completion = values["completion"] or ""
        found.append({
            "split": scored.split,
            "iteration": iteration,
            "prompt_id": values["prompt_id"],
            "sample_index": values["sample_index"],
            "prompt": shortened(values["prompt"] or "", characters),
            "completion": shortened(completion, characters),
            "truth": {name: shortened(_text(values[name]), characters) for name in truths},
            "rewards": {name: _figure(values[REWARD_PREFIX + name]) for name in functions},
            "reward": _figure(values["reward"]),
            "advantage": _figure(scored.advantages[i]),
            "length": scored.lengths[i],
            "finish": values["finish_reason"],
            "truncated": scored.truncated[i],
            "right": scored.right[i],
            "answer": shortened(extract_answer(completion, scored.pattern), 200),
            "error": shortened(values["error"], characters) if values["error"] else None,
        })  # fmt: skip
    return found


def shortened(text: str, characters: int) -> str:
    """The text, or its beginning and end with a word on what was left out between."""
    if len(text) <= characters:
        return text
    tail = characters // 3
    left_out = len(text) - characters
    return f"{text[: characters - tail]}\n… {left_out:,} characters left out …\n{text[-tail:]}"


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _figure(value: float | None) -> float | None:
    return None if value is None else round(value, 4)
