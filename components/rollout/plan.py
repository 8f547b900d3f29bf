"""What one rollout job has to draw: groups of samples, from the train prompts of its iteration and the eval prompts.

# P prompts, G completions a prompt
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from components.common.errors import DataError
from components.common.settings import RunContext
from components.rollout.config import RolloutSettings
from components.rollout.prompts import share
from components.rollout.sampler import SampleRequest, Sampling, sample_seed

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True)
class Group:
    """The G samples of one prompt; `row` is the prompt's row in its split's table."""

    split: str
    row: int
    requests: tuple[SampleRequest, ...]

    @property
    def key(self) -> tuple[str, str]:
        """What names a group within an iteration."""
        return self.split, self.requests[0].prompt_id


def eval_is_due(settings: RolloutSettings, context: RunContext, iteration: int, policy: int) -> bool:
    """Whether this iteration's rollout samples the held-out prompts too, `policy` being the policy's own iteration.

    So it is every so many policies, for a run's first one, and where nothing else is sampled; no policy has it twice.
    """
    if policy == context.first_iteration:  # with staleness 1 two rollouts sample from it
        return iteration == context.first_iteration
    return policy % settings.eval_every == 0 or not train_is_due(context, iteration)


def train_is_due(context: RunContext, iteration: int) -> bool:
    """Whether this iteration's rollout samples train prompts: no update learns from those after the last."""
    return iteration < context.last_iteration


def train_sampling(settings: RolloutSettings, stop_tokens: Sequence[int]) -> Sampling:
    """Distribution of training completions."""
    return Sampling(
        temperature=settings.temperature, max_tokens=settings.max_completion_length, top_p=settings.top_p,
        top_k=settings.top_k, stop=settings.stop,
        stop_token_ids=tuple(dict.fromkeys([*stop_tokens, *settings.stop_token_ids])),
    )  # fmt: skip


def eval_sampling(settings: RolloutSettings, stop_tokens: Sequence[int]) -> Sampling:
    """Distribution of held-out completions."""
    return replace(
        train_sampling(settings, stop_tokens),
        temperature=settings.eval_temperature, top_p=settings.eval_top_p, top_k=None,
    )  # fmt: skip


def make_groups(
    split: str, table: "pa.Table", rows: Sequence[int], *, size: int, sampling: Sampling, seed: int, iteration: int
) -> list[Group]:
    """Groups of `size` samples for the given rows of a prompts table."""
    prompts = table.select(["prompt_id", "prompt_ids"]).take(rows).to_pylist()
    return [
        Group(split, row, tuple(
            SampleRequest(name, index, ids, sample_seed(seed, split, iteration, name, index), sampling)
            for index in range(size)
        ))
        for row, (name, ids) in zip(rows, ((p["prompt_id"], tuple(p["prompt_ids"])) for p in prompts), strict=True)
    ]  # fmt: skip


def shard_rows(num_rows: int, context: RunContext, shard: int) -> list[int]:
    """A shard's held-out prompts."""
    return share(range(num_rows), shard, context.shards)


def in_drawing_order(groups: Sequence[Group]) -> list[Group]:
    """Groups of one sampling together, short prompts first, equal beginnings side by side: less padding."""
    kinds = list(dict.fromkeys(group.requests[0].sampling for group in groups))
    order: Callable[[Group], tuple] = lambda group: (  # noqa: E731
        kinds.index(group.requests[0].sampling), len(group.requests[0].prompt_ids), group.requests[0].prompt_ids,
    )  # fmt: skip
    return sorted(groups, key=order)


def longest_prompt(tables: "Iterable[pa.Table]") -> int:
    """Tokens of the longest prompt of the data set: engines of one size, whatever an iteration draws, compile once."""
    import pyarrow.compute as pc

    return max(pc.max(pc.list_value_length(table.column("prompt_ids"))).as_py() or 0 for table in tables)


def check_fits(
    groups: Sequence[Group], *, context: int | None, vocabulary: int | None, max_model_len: int | None = None
) -> None:
    """Refuses prompts that the policy, or an engine of `max_model_len` tokens, cannot take, before one is started.

    Raises:
        DataError: a prompt with its completion is longer than the model's context, or has a token id the model lacks.
    """
    for group in groups:
        request = group.requests[0]
        length, reserve = len(request.prompt_ids), request.sampling.max_tokens
        if length == 0:
            raise DataError(f"prompt {request.prompt_id} has no tokens: drop it in the dataset stage")
        if context is not None and length + reserve > context:
            raise DataError(
                f"prompt {request.prompt_id} has {length} tokens and {reserve} are kept for its completion, but the "
                f"model's context is {context}: set dataset.max_prompt_length to {max(context - reserve, 0)} or less, "
                "or lower rollout.max_completion_length"
            )
        if max_model_len is not None and length + reserve > max_model_len:
            raise DataError(
                f"prompt {request.prompt_id} has {length} tokens and {reserve} are kept for its completion, but "
                f"rollout.vllm.max_model_len is {max_model_len}: set it to {length + reserve} or more, or unset it"
            )
        if vocabulary is not None and max(request.prompt_ids) >= vocabulary:
            raise DataError(
                f"prompt {request.prompt_id} has token id {max(request.prompt_ids)}, the policy's vocabulary has "
                f"{vocabulary}: the prompts were made with another tokenizer; run the dataset stage with this policy"
            )
