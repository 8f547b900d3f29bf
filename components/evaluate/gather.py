"""What the stages before told of an iteration, gathered from their manifests."""

import logging
from collections.abc import Mapping, Sequence

from components.common.errors import DataError, StageError
from components.common.manifest import Manifest, manifest_key
from components.common.store import Store
from components.evaluate.history import finite
from components.evaluate.samples import Table

log = logging.getLogger("grpo")

_OF_THE_BATCH = ("reward", "frac_reward", "completions/")
SECONDS = "seconds"
"""Entry of a manifest's metadata: how long its stage took."""


def check_policy(policy: Manifest, iteration: int, tables: Mapping[str, Table]) -> None:
    """Whether it is this policy that is judged here.

    Raises:
        StageError: the policy is of another iteration.
        DataError: another policy wrote some of the samples.
    """
    if policy.iteration not in (None, iteration):
        raise StageError(
            f"evaluation {iteration} was given the policy of iteration {policy.iteration}: check the wiring of stages"
        )
    for split, table in tables.items():
        digests = table.table.column("policy_digest").to_pylist()
        strange = [digest for digest in digests if digest != policy.digest]
        if strange:
            raise DataError(
                f"{len(strange)} of {len(digests)} {split} samples were written by policy {strange[0]}, the one to "
                f"judge is {policy.digest}: give evaluate the policy that was sampled"
            )


def rollouts_of(store: Store, scored: Manifest) -> list[Manifest]:
    """The rollout manifests a scored artifact was made of: those of its iteration whose digests are its parents."""
    folder = manifest_key(scored.fine_tune, scored.run, scored.iteration, "any").rpartition("/")[0] + "/"
    parents = set(scored.parents.values())
    found = [Manifest.parse(store.get_bytes(stat.key), where=stat.key) for stat in store.list(folder)]
    return [manifest for manifest in found if manifest.kind == "rollout" and manifest.digest in parents]


def metrics_of(scored: Manifest, policy: Manifest) -> dict[str, float]:
    """Metrics of all stages behind an evaluation, under their own names; those of the rollout stand in `scored`.

    What an update says of its batch's rewards concerns the iteration before and is left to that iteration's record.
    """
    updated = {name: value for name, value in finite(policy.metrics).items() if not name.startswith(_OF_THE_BATCH)}
    return updated | finite(scored.metrics)


def seconds_of(rollouts: Sequence[Manifest], scored: Manifest, policy: Manifest) -> dict[str, float]:
    """Stage → seconds; of shards the slowest, since they run side by side."""
    found: dict[str, float] = {}
    for manifest in [*rollouts, scored, policy]:
        seconds = manifest.metadata.get(SECONDS)
        if isinstance(seconds, int | float) and manifest.producer.stage in ("rollout", "reward", "update"):
            found[manifest.producer.stage] = max(found.get(manifest.producer.stage, 0.0), float(seconds))
    return found
