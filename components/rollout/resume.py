"""What a rollout has drawn already, kept in the store so that a killed one goes on where it stopped.

Finished groups are saved as small Parquet files below `partial/`, each named by its own digest: a file that is cut or
foreign is dropped and its groups are drawn again. They go when the rollout is published.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from components.common.errors import ArtifactNotFound, DataError, DigestMismatch
from components.common.manifest import file_digest
from components.common.records import read_table, write_table
from components.common.store import Store
from components.rollout.plan import Group

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

log = logging.getLogger("grpo")

Key = tuple[str, str]


@dataclass(frozen=True)
class Sample:
    """One finished sample: T token ids (int32) and their log-probabilities (float32)."""

    completion_ids: "np.ndarray"
    logprobs: "np.ndarray"
    finish_reason: str
    error: str | None = None

    @property
    def failed(self) -> bool:
        """Whether it could not be drawn."""
        return self.finish_reason == "error"


def _fields() -> "dict[str, pa.DataType]":
    import pyarrow as pa

    return {
        "split": pa.string(), "prompt_id": pa.string(), "sample_index": pa.int32(), "seed": pa.int64(),
        "completion_ids": pa.list_(pa.int32()), "logprobs": pa.list_(pa.float32()), "finish_reason": pa.string(),
        "error": pa.string(), "policy_digest": pa.string(),
    }  # fmt: skip


class Saved:
    """Finished groups of one rollout job in the store. `digest` is the policy that must have written them."""

    def __init__(self, store: Store, prefix: str, digest: str, work_dir: Path) -> None:
        self.store, self.prefix, self.digest, self.work_dir = store, prefix, digest, work_dir
        self.count = 0

    def load(self, groups: Sequence[Group]) -> dict[Key, list[Sample]]:
        """Groups that an interrupted run of the same work has finished; each is taken whole or not at all."""
        wanted = {group.key: group for group in groups}
        found: dict[Key, dict[int, Sample]] = {}
        for stat in list(self.store.list(self.prefix)):
            self.count += 1
            for row in self._read(stat.key):
                group = wanted.get((row["split"], row["prompt_id"]))
                if group is None or row["policy_digest"] != self.digest:
                    continue
                index = row["sample_index"]
                if index < len(group.requests) and group.requests[index].seed == row["seed"]:
                    found.setdefault(group.key, {})[index] = _sample(row)
        return {
            key: [samples[index] for index in range(len(samples))]
            for key, samples in found.items()
            if len(samples) == len(wanted[key].requests)
        }

    def _read(self, key: str) -> list[dict]:
        path = self.work_dir / key.rsplit("/", 1)[-1]
        try:
            self.store.get_file(key, path)
            if file_digest(path).removeprefix("blake3:")[:32] not in path.name:
                raise DataError("its bytes are not those that were saved")
            return read_table(path, _fields()).to_pylist()
        except (DataError, ArtifactNotFound, DigestMismatch) as problem:  # without it the work is done again
            log.warning("saved part %s is dropped and its groups are drawn again: %s", key, problem)
            self.store.delete(key)
            return []
        finally:
            path.unlink(missing_ok=True)

    def save(self, groups: Sequence[tuple[Group, Sequence[Sample]]]) -> None:
        """Puts finished groups into the store, whole or not at all."""
        import pyarrow as pa

        rows = [
            {"split": group.split, "prompt_id": request.prompt_id, "sample_index": request.sample_index,
             "seed": request.seed, "completion_ids": sample.completion_ids, "logprobs": sample.logprobs,
             "finish_reason": sample.finish_reason, "error": sample.error, "policy_digest": self.digest}
            for group, samples in groups
            for request, sample in zip(group.requests, samples, strict=True)
        ]  # fmt: skip
        path = self.work_dir / "part.parquet"
        write_table(pa.Table.from_pylist(rows, schema=pa.schema(_fields())), path, _fields())
        digest = file_digest(path).removeprefix("blake3:")[:32]
        self.store.put_file(path, f"{self.prefix}{self.count:05d}-{digest}.parquet")
        self.count += 1
        path.unlink()

    def clear(self) -> None:
        """Removes what was saved: the published rollout has it all."""
        for stat in list(self.store.list(self.prefix)):
            self.store.delete(stat.key)


def _sample(row: dict) -> Sample:
    import numpy as np

    return Sample(
        np.asarray(row["completion_ids"], np.int32), np.asarray(row["logprobs"], np.float32),
        row["finish_reason"], row["error"],
    )  # fmt: skip
