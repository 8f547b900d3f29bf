"""The champion: the accepted policy of a fine-tune, named by one small object that is overwritten on acceptance.

`pointers/<fine-tune>/champion.json`; written by publish, read by configure (`start_from = "champion"`) and by dataset,
which tells whether there is anything new to learn from.
"""

import json
from typing import Any

from pydantic import ValidationError

from components.common.errors import ArtifactError, ArtifactNotFound, StageError
from components.common.settings import Settings
from components.common.store import Store


class Champion(Settings):
    """Which policy it is, and how good."""

    schema_version: int = 1
    manifest: str
    """Key of the policy's manifest in the store."""
    digest: str
    """Digest of the policy."""
    evaluation: str
    """Key of the evaluation that spoke for it."""
    evaluation_digest: str
    run: str
    iteration: int
    metric: str
    value: float
    low: float | None = None
    """Lower end of the metric's 95 % interval, where it has one."""
    high: float | None = None
    accepted: str
    """When: ISO 8601, UTC."""
    dataset_digest: str | None = None
    """Content of the data set it was trained on."""
    previous: str | None = None
    """Key of the policy it took over from."""
    decision: dict[str, Any] = {}
    """The decision that made it champion, so that a stage that is repeated says the same again."""


def key(fine_tune: str) -> str:
    """Where the pointer lies."""
    return f"pointers/{fine_tune}/champion.json"


def read(store: Store, fine_tune: str) -> Champion | None:
    """The present champion; None before the first.

    Raises:
        ArtifactError: the pointer cannot be read as one.
    """
    try:
        return _parse(store.get_bytes(key(fine_tune)), fine_tune)
    except ArtifactNotFound:
        return None


def _parse(data: bytes, fine_tune: str) -> Champion:
    try:
        return Champion.model_validate_json(data)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise ArtifactError(
            f"{key(fine_tune)} is not a champion pointer ({'.'.join(map(str, first['loc']))}: {first['msg']}); "
            "restore it, or delete it to let the next accepted policy take its place"
        ) from None


def write(store: Store, fine_tune: str, champion: Champion, *, after: Champion | None = None) -> None:
    """Moves the pointer on from the champion it was decided against; whoever reads sees the old or the new one, whole.

    Raises:
        StageError: it points to another by now; nothing was changed.
    """
    text = (json.dumps(champion.model_dump(mode="json"), indent=1, sort_keys=True) + "\n").encode()
    if after is None:
        moved = store.put_bytes(text, key(fine_tune), if_absent=True)
    else:
        present = store.get_bytes(key(fine_tune))
        moved = _parse(present, fine_tune) == after and store.put_bytes(text, key(fine_tune), instead_of=present)
    if not moved:
        raise StageError(
            f"another run moved the champion of {fine_tune} while this one was judged; nothing was changed: run "
            "publish again, it then judges against the new champion"
        )
