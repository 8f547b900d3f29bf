"""Drawing prompts less often whose last group was all alike: all right or all wrong, there is nothing to learn from.

Each prompt has the number of the epoch it is drawn in next; an iteration draws those whose turn comes first, in the
order that `prompts.choose` has. A drawn prompt's number goes up by one, and by more when its group came out alike.
With nothing to postpone that is `prompts.choose` itself.

The numbers travel in the rollout's metadata, through reward, to the rollout that follows in the chain: the policy it
is given names the scored rollout it was made from, and a run's start policy those of the run before. With staleness 1
two chains take turns, each with half of the prompts, since a rollout does not know yet what the one just before it
drew.

# N train prompts, P prompts an iteration
"""

import base64
import logging
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from components.common.errors import ArtifactError
from components.common.manifest import SCORED_BEFORE, Manifest, manifest_key
from components.common.stage import Stage
from components.rollout.config import RolloutSettings
from components.rollout.prompts import check_enough, prompt_keys, ranks, visits_before

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

log = logging.getLogger("grpo")

METADATA = "curriculum"
_FARTHEST = 255
"""Epochs a prompt can be ahead of the one that is due first; a byte holds it."""


@dataclass
class Turns:
    """The epoch each of N prompts is drawn in next: `turn_N`, int64."""

    keys_N: "np.ndarray"
    turn_N: "np.ndarray"
    seed: int

    def draw(self, num_prompts: int, members_N: "np.ndarray") -> list[int]:
        """Rows of the P members whose turn comes first, in their order; their turn moves to the next epoch."""
        import numpy as np

        rows = np.flatnonzero(members_N)
        order = np.lexsort((ranks(self.keys_N[rows], self.seed, self.turn_N[rows]), self.turn_N[rows]))
        chosen = rows[order[:num_prompts]]
        self.turn_N[chosen] += 1
        return chosen.tolist()

    def postpone(self, rows: Sequence[int], weight: float) -> None:
        """Lets prompts sit out so many epochs that they are drawn `weight` times as often."""
        self.turn_N[list(rows)] += round(1 / weight) - 1

    def dump(self, members_N: "np.ndarray", **belongs_to: Any) -> dict[str, Any]:
        """As metadata of a manifest: about a quarter of a byte a prompt. `belongs_to`: what must be equal to go on."""
        import numpy as np

        first = int(self.turn_N[members_N].min())
        ahead_N = np.clip(self.turn_N - first, 0, _FARTHEST).astype(np.uint8)
        packed = base64.b64encode(zlib.compress(ahead_N.tobytes(), 9)).decode()
        return {**belongs_to, "first": first, "ahead": packed}

    @classmethod
    def load(cls, keys_N: "np.ndarray", seed: int, value: dict[str, Any]) -> "Turns":
        """From a manifest's metadata."""
        import numpy as np

        ahead_N = np.frombuffer(zlib.decompress(base64.b64decode(value["ahead"])), dtype=np.uint8)
        return cls(keys_N, ahead_N.astype(np.int64) + value["first"], seed)


def members_of(keys_N: "np.ndarray", iteration: int, staleness: int) -> "np.ndarray":
    """Prompts the chain of this iteration draws from, bool (N,): all, or with staleness 1 every other one."""
    import numpy as np

    chains = staleness + 1
    place_N = np.argsort(np.argsort(keys_N, kind="stable"), kind="stable")
    return place_N % chains == iteration % chains


def choose_by_outcome(stage: Stage[RolloutSettings], names: Sequence[str]) -> tuple[list[int], dict[str, Any], int]:
    """Rows of the iteration's prompts, the metadata that carries the turns on, and how many prompts were postponed."""
    context, settings, iteration = stage.context, stage.settings, stage.iteration
    keys_N = prompt_keys(names)
    members_N = members_of(keys_N, iteration, context.staleness)
    half = " in this half (staleness = 1 with a curriculum_weight halves them)" if context.staleness else ""
    check_enough(int(members_N.sum()), settings.num_prompts, f"train prompts{half}")
    belongs_to = {"prompts": stage.manifest("prompts").digest, "seed": context.seed, "staleness": context.staleness}
    found, postponed = scored_before(stage, belongs_to), []
    if found is None:
        turns = _fresh(keys_N, members_N, stage)
    else:
        before, rewards = found
        turns = Turns.load(keys_N, context.seed, before.metadata[METADATA])
        row_of = {name: row for row, name in enumerate(names)}
        postponed = [row_of[name] for name in alike_groups(rewards)]
        turns.postpone(postponed, settings.curriculum_weight)
    chosen = turns.draw(settings.num_prompts, members_N)
    return chosen, {METADATA: turns.dump(members_N, **belongs_to)}, len(postponed)


def _fresh(keys_N: "np.ndarray", members_N: "np.ndarray", stage: Stage[RolloutSettings]) -> Turns:
    """Turns of a chain nothing is known of: as if no prompt had ever been postponed."""
    import numpy as np

    turn_N, done = np.zeros(len(keys_N), dtype=np.int64), stage.iteration // (stage.context.staleness + 1)
    size, seed = stage.settings.num_prompts, stage.context.seed
    turn_N[members_N] = visits_before(keys_N[members_N], seed=seed, num_prompts=size, iteration=done)
    return Turns(keys_N, turn_N, seed)


def scored_before(stage: Stage[RolloutSettings], belongs_to: Mapping[str, Any]) -> "tuple[Manifest, pa.Table] | None":
    """The scored rollout before this one in its chain, and its rewards; None where the chain starts afresh.

    That is so at a fine-tune's beginning, with other prompts, seed or staleness than before, and where it is gone.
    """
    place = _place_before(stage)
    if place is None:
        return None
    key, wanted = place
    try:
        found = Manifest.parse(stage.store.get_bytes(key), where=key)
        state = found.metadata.get(METADATA, {})
        if found.digest != wanted or any(state.get(name) != value for name, value in belongs_to.items()):
            return None
        return found, _rewards(stage, found)
    except ArtifactError as problem:  # every prompt still has its turn
        log.warning("curriculum: %s; it starts afresh", problem)
        return None


def _place_before(stage: Stage[RolloutSettings]) -> tuple[str, str] | None:
    """Key and digest of the manifest: the parent of the policy, or for a run's start policy what configure noted."""
    policy, wanted = stage.manifest("policy"), stage.iteration - stage.context.staleness - 1
    if "scored" in policy.parents and policy.iteration == wanted + 1:
        return manifest_key(policy.fine_tune, policy.run, wanted, "scored"), policy.parents["scored"]
    entries = policy.metadata.get(SCORED_BEFORE, ())
    return next(((entry["manifest"], entry["digest"]) for entry in entries if entry["iteration"] == wanted), None)


def _rewards(stage: Stage[RolloutSettings], scored: Manifest) -> "pa.Table":
    from components.common.records import read_table, reward_fields

    folder = stage.fetch_manifest(scored, "scored", ["train_rewards.parquet"])
    return read_table(folder / "train_rewards.parquet", reward_fields([]), columns=["prompt_id", "reward"])


def alike_groups(rewards: "pa.Table") -> list[str]:
    """Prompts whose samples all have one reward; samples without a reward do not count."""
    import pyarrow.compute as pc

    known = rewards.filter(pc.is_valid(rewards.column("reward")))
    spread = known.group_by("prompt_id").aggregate([("reward", "min"), ("reward", "max")])
    alike = spread.filter(pc.equal(spread.column("reward_min"), spread.column("reward_max")))
    return alike.column("prompt_id").to_pylist()
