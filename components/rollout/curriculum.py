"""Drawing prompts less often whose last group was all alike: all right or all wrong, there is nothing to learn from.

Each prompt has the number of the epoch it is drawn in next; an iteration draws those whose turn comes first, in the
order that `prompts.choose` has. A drawn prompt's number goes up by one, and by more when its group came out alike.
With nothing to postpone that is `prompts.choose` itself.

The numbers travel in the rollout's metadata, through reward, to the rollout that follows in the chain: the policy it
is given names the scored rollout it was made from. With staleness 1 two chains take turns, each with half of the
prompts, since a rollout does not know yet what the one just before it drew.

# N train prompts, P prompts an iteration
"""

import base64
import logging
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from components.common.errors import ArtifactError
from components.common.manifest import Manifest, manifest_key
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
        check_enough(len(rows), num_prompts)
        order = np.lexsort((ranks(self.keys_N[rows], self.seed, self.turn_N[rows]), self.turn_N[rows]))
        chosen = rows[order[:num_prompts]]
        self.turn_N[chosen] += 1
        return chosen.tolist()

    def postpone(self, rows: Sequence[int], weight: float) -> None:
        """Lets prompts sit out so many epochs that they are drawn `weight` times as often."""
        self.turn_N[list(rows)] += round(1 / weight) - 1

    def dump(self, prompts: str, members_N: "np.ndarray") -> dict[str, Any]:
        """As metadata of a manifest: about a quarter of a byte a prompt. `prompts` is the digest of their artifact."""
        import numpy as np

        first = int(self.turn_N[members_N].min())
        ahead_N = np.clip(self.turn_N - first, 0, _FARTHEST).astype(np.uint8)
        packed = base64.b64encode(zlib.compress(ahead_N.tobytes(), 9)).decode()
        return {"prompts": prompts, "first": first, "ahead": packed}

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
    keys_N, prompts = prompt_keys(names), stage.manifest("prompts").digest
    members_N = members_of(keys_N, iteration, context.staleness)
    before = scored_before(stage)
    postponed: list[int] = []
    if before is not None and before.metadata.get(METADATA, {}).get("prompts") == prompts:
        turns = Turns.load(keys_N, context.seed, before.metadata[METADATA])
        row_of = {name: row for row, name in enumerate(names)}
        postponed = [row_of[name] for name in alike_groups(_rewards(stage, before))]
        turns.postpone(postponed, settings.curriculum_weight)
    else:
        turns = _fresh(keys_N, members_N, stage)
    chosen = turns.draw(settings.num_prompts, members_N)
    return chosen, {METADATA: turns.dump(prompts, members_N)}, len(postponed)


def _fresh(keys_N: "np.ndarray", members_N: "np.ndarray", stage: Stage[RolloutSettings]) -> Turns:
    """Turns of a chain nothing is known of: as if no prompt had ever been postponed."""
    import numpy as np

    turn_N, done = np.zeros(len(keys_N), dtype=np.int64), stage.iteration // (stage.context.staleness + 1)
    size, seed = stage.settings.num_prompts, stage.context.seed
    check_enough(int(members_N.sum()), size)
    turn_N[members_N] = visits_before(keys_N[members_N], seed=seed, num_prompts=size, iteration=done)
    return Turns(keys_N, turn_N, seed)


def scored_before(stage: Stage[RolloutSettings]) -> Manifest | None:
    """The scored rollout the policy was updated with; None for a policy that was not updated in this fine-tune."""
    policy = stage.manifest("policy")
    wanted = policy.parents.get("scored")
    if wanted is None or not policy.iteration:
        return None
    key = manifest_key(policy.fine_tune, policy.run, policy.iteration - 1, "scored")
    try:
        found = Manifest.parse(stage.store.get_bytes(key), where=key)
    except ArtifactError as problem:  # the curriculum then starts afresh; every prompt still has its turn
        log.warning("curriculum: %s; it starts afresh", problem)
        return None
    return found if found.digest == wanted else None


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
