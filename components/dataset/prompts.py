"""From rows of any data set to prompts: which column, which ids, which rows cannot be used.

# P prompts, T tokens of a prompt
"""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from components.common.errors import DataError
from components.common.records import MESSAGES, REWARD_PREFIX, completion_fields, prompt_fields
from components.dataset.config import DatasetSettings
from components.dataset.tokens import Prompt, messages_of, render, tokenise

if TYPE_CHECKING:
    import pyarrow as pa

ROWS_SHOWN = 5


@dataclass
class Prompts:
    """Prompts of one split, row by row: ids, rendered texts, tokens, the data set's own columns; and rows left out."""

    split: str
    ids: list[str]
    texts: list[str]
    tokens_PT: list[list[int]]
    columns: "pa.Table"
    num_rows: int
    dropped: Counter[str] = field(default_factory=Counter)
    """Why → how many rows were left out."""
    messages: list[str] | None = None
    """The chat messages each text was rendered from, as JSON; None for plain text."""

    def keep(self, rows: Sequence[int]) -> "Prompts":
        """These rows only."""
        import pyarrow as pa

        return Prompts(
            self.split, [self.ids[i] for i in rows], [self.texts[i] for i in rows], [self.tokens_PT[i] for i in rows],
            self.columns.take(pa.array(rows, pa.int64())), self.num_rows, self.dropped,
            None if self.messages is None else [self.messages[i] for i in rows],
        )  # fmt: skip

    def drop(self, bad: Sequence[bool], reason: str) -> "Prompts":
        """Without the rows marked `bad`, which are counted under `reason`."""
        if not any(bad):
            return self
        self.dropped[reason] += sum(bad)
        return self.keep([row for row, marked in enumerate(bad) if not marked])

    def table(self) -> "pa.Table":
        """As the record that travels to the rollout."""
        import pyarrow as pa

        fields = prompt_fields()
        own = [self.ids, self.texts, self.tokens_PT]
        arrays = [pa.array(values, kind) for values, kind in zip(own, fields.values(), strict=True)]
        table = pa.table([*arrays, *self.columns.columns], names=[*fields, *self.columns.column_names])
        if self.messages is not None:
            table = table.append_column(MESSAGES, pa.array(self.messages, pa.string()))
        return table.combine_chunks()


def make_prompts(split: str, table: "pa.Table", tokenizer: Any, settings: DatasetSettings) -> Prompts:
    """Renders and tokenises the prompts of a table, rows without a prompt and repeated rows left out.

    Raises:
        DataError: no prompt column, prompts of another kind, empty prompts, or duplicate ids.
    """
    import pyarrow as pa

    prompts_P = _prompt_column(split, table, settings)
    own = _own_columns(split, table, settings)
    empty = [not _has_text(prompt) for prompt in prompts_P]
    if any(empty) and settings.empty_prompts == "error":
        raise DataError(
            f"{split}: {sum(empty)} of {table.num_rows} rows have an empty {settings.prompt_column} "
            f'({_numbers(empty)}): remove them, or set dataset.empty_prompts = "drop"'
        )
    rows = [row for row, bad in enumerate(empty) if not bad]
    kept = [prompts_P[row] for row in rows]
    chosen = pa.array(rows, pa.int64())  # typed: of no rows at all Arrow would not know
    ids = _ids(split, table.take(chosen), kept, own.take(chosen), settings)
    texts = render(kept, tokenizer, settings)
    tokens_PT = tokenise(texts, tokenizer, rendered=settings.chat_template)
    chats = kept if settings.chat_template else []
    messages = [json.dumps(messages_of(prompt, settings), default=str) for prompt in chats]
    prompts = Prompts(
        split, ids, texts, tokens_PT, own.take(chosen), table.num_rows, Counter(empty=sum(empty)),
        messages if settings.chat_template else None,
    )  # fmt: skip
    if settings.id_column is None:
        first = {name: row for row, name in reversed(list(enumerate(ids)))}
        prompts = prompts.drop([first[name] != row for row, name in enumerate(ids)], "repeated")
    return prompts.drop([not ids_T for ids_T in prompts.tokens_PT], "without tokens")


def _prompt_column(split: str, table: "pa.Table", settings: DatasetSettings) -> list[Prompt | None]:
    name = settings.prompt_column
    if name not in table.column_names:
        raise DataError(
            f"{split}: no column {name}; there are {', '.join(table.column_names) or 'none'}: "
            "name the one with the prompts in dataset.prompt_column"
        )
    values = table.column(name).to_pylist()
    for row, value in enumerate(values):
        if value is not None and not isinstance(value, str) and not _is_messages(value):
            raise DataError(
                f"{split}, row {row}: {name} must be text or a list of messages with role and content, "
                f"got {type(value).__name__}: {str(value)[:80]}"
            )
    return values


def _is_messages(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(message, dict) and isinstance(message.get("role"), str) and "content" in message for message in value
    )


def _has_text(prompt: Prompt | None) -> bool:
    if isinstance(prompt, str):
        return bool(prompt.strip())
    return bool(prompt) and any(message["content"] for message in prompt)


def _own_columns(split: str, table: "pa.Table", settings: DatasetSettings) -> "pa.Table":
    """The columns that travel on; their names must be free.

    Raises:
        DataError: a column that is asked for is not there, or its name belongs to completions or rewards.
    """
    used = {settings.prompt_column, settings.id_column}
    names = [name for name in table.column_names if name not in used] if settings.columns is None else settings.columns
    missing = [name for name in names if name not in table.column_names]
    if missing:
        raise DataError(
            f"{split}: dataset.columns names {', '.join(missing)}; there are {', '.join(table.column_names)}"
        )
    reserved = {*completion_fields(), MESSAGES, "reward", "error", "prompts", "completions"}
    taken = [name for name in names if name in reserved or name.startswith(REWARD_PREFIX)]
    if taken:
        raise DataError(
            f"{split}: the column name {', '.join(taken)} is needed for what the model writes: rename it, "
            "or list the columns to keep in dataset.columns"
        )
    return table.select(list(names))


def _ids(
    split: str, table: "pa.Table", prompts_P: Sequence[Prompt | None], own: "pa.Table", settings: DatasetSettings
) -> list[str]:
    name = settings.id_column
    if name is None:
        rows = rows_of(own, len(prompts_P))
        return [content_id(prompt, row) for prompt, row in zip(prompts_P, rows, strict=True)]
    if name not in table.column_names:
        raise DataError(f"{split}: no column {name} for ids; there are {', '.join(table.column_names)}")
    values = table.column(name).to_pylist()
    absent = [value is None or str(value) == "" for value in values]
    if any(absent):
        raise DataError(f"{split}: {sum(absent)} rows have no {name} ({_numbers(absent)}): fill it in for every row")
    ids = [str(value) for value in values]
    often = [(value, count) for value, count in Counter(ids).most_common(ROWS_SHOWN) if count > 1]
    if often:
        shown = ", ".join(f"{value!r} {count} times" for value, count in often)
        raise DataError(
            f"{split}: duplicate ids in column {name}: {shown}; make them distinct, or leave dataset.id_column out "
            "to name rows by their content"
        )
    return ids


def rows_of(table: "pa.Table", count: int) -> list[dict[str, Any]]:
    """The `count` rows of a table, which forgets their number when it has no columns."""
    return table.to_pylist() if table.num_columns else [{}] * count


def content_id(prompt: Prompt | None, row: dict[str, Any]) -> str:
    """Name of a row: a digest of its prompt and its other columns, the same in whatever order rows are read."""
    text = json.dumps([prompt, row], sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).hexdigest()


def _numbers(marked: Sequence[bool]) -> str:
    rows = [row for row, is_marked in enumerate(marked) if is_marked]
    more = "" if len(rows) <= ROWS_SHOWN else f" and {len(rows) - ROWS_SHOWN} more"
    return f"row{'s' if len(rows) > 1 else ''} {', '.join(map(str, rows[:ROWS_SHOWN]))}{more}, counted from 0"
