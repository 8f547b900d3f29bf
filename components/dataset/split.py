"""Which prompts fit, which are held out, and one digest for all of it.

# P prompts, T tokens of a prompt
"""

import hashlib
import json
from collections.abc import Iterable, Sequence

from components.common.errors import DataError, SettingsError
from components.dataset.config import DatasetSettings
from components.dataset.prompts import Prompts, rows_of

DEFAULT_NUM_EVAL = 128
"""Prompts held out of a train split when nobody says how many."""


def drop_long(prompts: Prompts, settings: DatasetSettings, context: int | None) -> Prompts:
    """Without prompts beyond `max_prompt_length`, or beyond what the completion leaves of the model's context.

    Raises:
        SettingsError: the completion alone fills the context.
        DataError: a prompt is too long and `long_prompts` says to refuse.
    """
    room = settings.max_completion_length or 0
    if context is not None and room >= context:
        raise SettingsError(
            f"max_completion_length = {room} leaves no room for a prompt in the model's context of {context} tokens: "
            f"lower it below {context}"
        )
    lengths_P = [len(ids_T) for ids_T in prompts.tokens_PT]
    bounds = {f"longer than max_prompt_length = {settings.max_prompt_length}": settings.max_prompt_length}
    bounds[f"beyond the context of {context} less {room} for the completion"] = context and context - room
    for reason, bound in bounds.items():
        if bound is None:
            continue
        bad = [length > bound for length in lengths_P]
        if any(bad) and settings.long_prompts == "error":
            first = bad.index(True)
            raise DataError(
                f"{prompts.split}: {sum(bad)} prompts are {reason} tokens, the first is {prompts.ids[first]} with "
                f'{lengths_P[first]}: shorten them, raise the limit, or set dataset.long_prompts = "drop"'
            )
        prompts = prompts.drop(bad, reason)
        lengths_P = [length for length, dropped in zip(lengths_P, bad, strict=True) if not dropped]
    return prompts


def require_some(prompts: Prompts) -> Prompts:
    """The prompts, if there are any.

    Raises:
        DataError: none is left; says what became of the rows.
    """
    if not prompts.ids:
        reasons = ", ".join(f"{count} {reason}" for reason, count in prompts.dropped.items() if count)
        raise DataError(
            f"{prompts.split}: no prompts left of {prompts.num_rows} rows{': ' + reasons if reasons else ''}; "
            "check dataset.source, and the limits in dataset.max_prompt_length and rollout.max_completion_length"
        )
    return prompts


def hold_out(train: Prompts, count: int | None, seed: int) -> tuple[Prompts, Prompts]:
    """Train prompts without the held-out ones, and `count` held-out ones; every text is on one side only.

    The texts with the lowest digests are held out, so most stay held out when the data set grows.

    Raises:
        DataError: too few different prompts.
    """
    count = count or DEFAULT_NUM_EVAL
    first: dict[str, int] = {}
    for row, text in enumerate(train.texts):
        first.setdefault(comparable(text), row)
    if len(first) <= count:
        raise DataError(
            f"train: {count} of {len(first)} different prompts are to be held out, which leaves none to train on: "
            "lower dataset.num_eval, or name an eval split"
        )
    chosen = set(_lowest(first, count, seed))
    held_out = train.keep([row for text, row in first.items() if text in chosen])
    held_out = Prompts(
        "eval", held_out.ids, held_out.texts, held_out.tokens_PT, held_out.columns, count, messages=held_out.messages
    )  # fmt: skip
    return train.drop([comparable(text) in chosen for text in train.texts], "held out"), held_out


def thin(prompts: Prompts, count: int | None, seed: int) -> Prompts:
    """At most `count` of the eval prompts, chosen by digest, in their order."""
    if count is None or count >= len(prompts.ids):
        return prompts
    rows = {f"{text}\0{name}": row for row, (text, name) in enumerate(zip(prompts.texts, prompts.ids, strict=True))}
    chosen = {rows[key] for key in _lowest(rows, count, seed)}
    return prompts.drop([row not in chosen for row in range(len(prompts.ids))], "beyond num_eval")


def without_eval(train: Prompts, held_out: Prompts) -> Prompts:
    """Train prompts whose text is not among the held-out ones."""
    texts = {comparable(text) for text in held_out.texts}
    return train.drop([comparable(text) in texts for text in train.texts], "also in eval")


def comparable(text: str) -> str:
    """A text as it is compared: white space does not make a prompt another."""
    return " ".join(text.split())


def dataset_digest(splits: Sequence[Prompts]) -> str:
    """Digest of all that the run sees of the data: ids, texts, tokens and columns, however they are stored."""
    hasher = hashlib.sha256()
    for prompts in splits:
        rows = rows_of(prompts.columns, len(prompts.ids))
        for row in zip(prompts.ids, prompts.texts, prompts.tokens_PT, rows, strict=True):
            line = json.dumps([prompts.split, *row], sort_keys=True, default=str)
            hasher.update(line.encode() + b"\n")
    return f"sha256:{hasher.hexdigest()}"


def _lowest(keys: Iterable[str], count: int, seed: int) -> list[str]:
    def place(key: str) -> bytes:
        return hashlib.blake2b(f"{seed}\0{key}".encode(errors="surrogatepass"), digest_size=16).digest()

    return sorted(keys, key=place)[:count]
