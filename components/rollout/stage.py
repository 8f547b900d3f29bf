"""Samples the completions of one iteration (one shard of them) from a policy, and proves which policy wrote them.

# P prompts, G completions a prompt, T tokens
"""

import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.common.errors import DataError, StageError
from components.common.settings import load_stage
from components.common.stage import Stage, run_stage
from components.common.tokenizer import tokenizer_digest
from components.rollout.config import RolloutSettings
from components.rollout.relay import run_elsewhere, runs_elsewhere

if TYPE_CHECKING:
    import pyarrow as pa

    from components.rollout.collect import Collection
    from components.rollout.plan import Group

log = logging.getLogger("grpo")


def run(settings: str, iteration: int, shard: int, policy: Path, prompts: Path, completions: Path) -> None:
    """Samples completions from a policy.

    settings: JSON of the run's context and this stage's settings, or a file of it. iteration: counted from 0 within
    the run; from the run's number of iterations on it samples the held-out prompts only. shard: which part of the
    prompts, from 0. policy, prompts: manifests to read. completions: manifest to write.
    """
    _, own = load_stage(RolloutSettings, settings)
    if runs_elsewhere(own.python):
        arguments = {"settings": settings, "iteration": iteration, "shard": shard}
        arguments |= {"policy": policy, "prompts": prompts, "completions": completions}
        run_elsewhere(own.python, __package__, arguments)
        return
    stage = Stage(
        "rollout", RolloutSettings, settings, iteration=iteration, shard=shard,
        inputs={"policy": policy, "prompts": prompts}, outputs={"completions": completions},
    )  # fmt: skip
    run_stage(stage, _rollout)


def _rollout(stage: Stage[RolloutSettings]) -> None:
    from components.rollout.collect import Collection, check_failures
    from components.rollout.engines import engine_name
    from components.rollout.plan import check_fits, in_drawing_order, longest_prompt
    from components.rollout.resume import Saved
    from components.rollout.sampler import stop_tokens
    from components.rollout.weights import context_length, vocabulary_size

    _check_policy(stage)
    folder, tables = stage.fetch("policy"), _read_prompts(stage)
    ends = stop_tokens(folder)
    if not (ends or stage.settings.stop or stage.settings.stop_token_ids):
        log.warning(
            "neither the policy's configuration nor its tokenizer names an end token, so every completion runs to "
            "max_completion_length: set rollout.stop_token_ids or rollout.stop"
        )
    groups, carried = _plan(stage, tables, ends)
    check_fits(
        groups, context=context_length(folder), vocabulary=vocabulary_size(folder),
        max_model_len=stage.settings.vllm.max_model_len if engine_name(stage.settings) == "vllm" else None,
    )  # fmt: skip
    digest, context = stage.manifest("policy").digest, stage.context
    place = f"partial/{context.fine_tune}/{context.run}/{stage.iteration:04d}/rollout-{stage.shard:02d}/"
    key = stage.producer.key.rpartition(":")[2][:16]
    saved = Saved(stage.store, f"{place}{key}/", digest, stage.work_dir)
    ordered = in_drawing_order(groups)
    collection = Collection(ordered, saved.load(ordered), saved)
    if collection.finished:
        log.info("%s: %d of %d groups were finished before", stage.task, len(collection.finished), len(groups))
    longest = longest_prompt(tables.values()) + stage.settings.max_completion_length
    figures, metadata = _draw(stage, folder, collection, min(longest, context_length(folder) or longest))
    check_failures(collection, stage.settings)
    _publish(stage, folder, tables, groups, collection, figures, metadata | carried)
    saved.clear()


def _check_policy(stage: Stage[RolloutSettings]) -> None:
    """Refuses a policy of another iteration than this rollout's, or of another tokenizer than the prompts'."""
    have = stage.manifest("policy").iteration
    first, want, behind = stage.context.first_iteration, stage.iteration, stage.context.staleness
    if have is not None and not max(first, want - behind) <= have <= want:
        raise StageError(
            f"iteration {want} was given the policy of iteration {have}; with staleness {behind} it samples from "
            f"policy {max(first, want - behind)}{' or ' + str(want) if behind else ''}: check how the stages are wired"
        )
    made_with = stage.manifest("prompts").metadata.get("tokenizer_digest")
    if made_with not in (None, tokenizer_digest(stage.manifest("policy"))):
        raise DataError(
            "the prompts were made with another tokenizer or chat template than this policy's: run the dataset stage "
            "with this policy"
        )


def _read_prompts(stage: Stage[RolloutSettings]) -> "dict[str, pa.Table]":
    from components.common.records import SPLITS, prompt_fields, read_table

    folder = stage.fetch("prompts")
    found = {split: folder / f"{split}.parquet" for split in SPLITS}
    return {split: read_table(path, prompt_fields()) for split, path in found.items() if path.exists()}


def _plan(
    stage: Stage[RolloutSettings], tables: "Mapping[str, pa.Table]", ends: Sequence[int]
) -> "tuple[list[Group], dict[str, Any]]":
    """Groups of this shard: the iteration's train prompts, and the held-out ones when they are due.

    Beside them the metadata that the choice of later prompts rests on.
    """
    from components.rollout import plan
    from components.rollout.prompts import share

    settings, context, iteration = stage.settings, stage.context, stage.iteration
    groups, carried = [], {}
    if plan.train_is_due(context, iteration):
        table = tables["train"]
        chosen, carried = _choose(stage, table.column("prompt_id").to_pylist())
        groups += plan.make_groups(
            "train", table, share(chosen, stage.shard, context.shards), size=settings.group_size,
            sampling=plan.train_sampling(settings, ends), seed=context.seed, iteration=iteration,
        )  # fmt: skip
    policy = _policy_iteration(stage)
    if "eval" in tables and plan.eval_is_due(settings, context, iteration, policy):
        table = tables["eval"]
        groups += plan.make_groups(
            "eval", table, plan.shard_rows(len(table), context, stage.shard), size=settings.eval_group_size,
            sampling=plan.eval_sampling(settings, ends), seed=context.seed, iteration=policy,
        )  # fmt: skip
    return groups, carried


def _choose(stage: Stage[RolloutSettings], names: Sequence[str]) -> tuple[list[int], dict[str, Any]]:
    """Rows of the iteration's train prompts, over all shards."""
    settings = stage.settings
    if settings.curriculum_weight == 1:
        from components.rollout.prompts import choose

        seed, num_prompts = stage.context.seed, settings.num_prompts
        return choose(names, seed=seed, num_prompts=num_prompts, iteration=stage.iteration), {}
    from components.rollout.curriculum import choose_by_outcome

    chosen, carried, postponed = choose_by_outcome(stage, names)
    log.info("%s: %d prompts of the last iteration are postponed", stage.task, postponed)
    return chosen, carried


def _draw(stage: Stage[RolloutSettings], folder: Path, collection: "Collection", longest: int) -> tuple[dict, dict]:
    """Starts the engine and draws what is pending; gives metrics and what the manifest tells about the engine."""
    from components.rollout.collect import draw_all
    from components.rollout.engines import engine_name, start_engine
    from components.rollout.text import open_tokenizer

    name = engine_name(stage.settings)
    if not collection.pending:
        return {}, {"engine": name}
    manifest = stage.manifest("policy")
    size = {"longest": longest, "num_requests": sum(len(group.requests) for group in collection.pending)}
    started = time.monotonic()
    sampler = start_engine(name, stage.settings, folder, manifest, open_tokenizer(folder), **size)
    try:
        digest = sampler.held_digest(manifest, folder)
        ready = time.monotonic()
        log.info("%s: %s started in %.1f s with policy %s", stage.task, name, ready - started, digest[:19])
        draw_all(collection, sampler, stage.settings, stage.progress)
    finally:
        sampler.close()
    seconds = time.monotonic() - ready
    figures = {
        "rollout/engine_start_seconds": ready - started, "rollout/seconds": seconds,
        "rollout/tokens_per_second": collection.num_tokens / seconds,
    }  # fmt: skip
    return figures, {"engine": name, "policy_digest": digest, "proof": sampler.proof}


def _publish(
    stage: Stage[RolloutSettings], folder: Path, tables: "Mapping[str, pa.Table]", groups: "Sequence[Group]",
    collection: "Collection", figures: dict[str, float], metadata: dict,
) -> None:  # fmt: skip
    from components.rollout.report import sampling_metadata, split_metrics, warn_if_truncated
    from components.rollout.table import write_completions
    from components.rollout.text import cut_at_stop, open_tokenizer

    decode, digest = open_tokenizer(folder), stage.manifest("policy").digest
    files, metrics = {}, dict(figures)
    for split, table in tables.items():
        mine = [group for group in groups if group.split == split]
        if not mine:
            continue
        texts = decode([s.completion_ids.tolist() for group in mine for s in collection.finished[group.key]])
        texts = [cut_at_stop(text, stage.settings.stop) for text in texts]
        path = stage.work_dir / f"{split}.parquet"
        files[path.name] = write_completions(path, table, mine, collection.finished, texts, digest)
        metrics |= split_metrics(split, mine, collection.finished)
    warn_if_truncated(metrics)
    if "train.parquet" in files:
        metrics["rollout/staleness"] = float(stage.iteration - _policy_iteration(stage))
    stage.publish(
        "completions", kind="rollout", files=files, metrics=metrics,
        metadata=metadata | sampling_metadata(stage.settings) | {"policy_iteration": _policy_iteration(stage)},
    )  # fmt: skip


def _policy_iteration(stage: Stage[RolloutSettings]) -> int:
    have = stage.manifest("policy").iteration
    return stage.context.first_iteration if have is None else have
