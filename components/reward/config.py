"""Settings of the reward stage: which functions score, with which weights, inside which limits."""

import ast
import re
from collections import Counter
from pathlib import Path
from typing import Any, Self

from pydantic import Field, field_validator, model_validator

from components.common.errors import SettingsError
from components.common.settings import Settings
from components.reward.names import BUILT_IN, nearest

LABEL_PATTERN = r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$"


class RewardFunction(Settings):
    """One reward function: what it is, how much it counts, what it is given."""

    name: str
    """Built-in name, `path/to/file.py:function` or `package.module:function`."""
    weight: float = Field(default=1.0, allow_inf_nan=False)
    """Factor of this function's score in the total reward; 0 only records the score."""
    arguments: dict[str, Any] = {}
    """Further keyword arguments of every call, beside prompts, completions and the data set's columns."""
    columns: dict[str, str] = {}
    """Parameter of the function → column of the data set, where the two differ: `{answer = "solution"}`."""
    messages: bool = False
    """Give prompts and completions as lists of chat messages, as TRL does for conversational data sets: the prompt's
    messages before the chat template rendered them, the completion as one of the assistant's."""
    label: str | None = Field(default=None, pattern=LABEL_PATTERN)
    """Name in metrics and tables, `rewards/<label>`; the function's own name when absent."""
    source: str | None = None
    """Text of the file `name` points to, so that it travels to the cluster; filled in when a run is submitted."""

    @property
    def title(self) -> str:
        """Name of this function in metrics, tables and messages."""
        return self.label or self.name.rpartition(":")[2]

    @property
    def path(self) -> Path | None:
        """The user's file, when `name` points to one."""
        place, separator, _ = self.name.rpartition(":")
        return Path(place) if separator and place.endswith(".py") else None

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        place, separator, function = name.rpartition(":")
        if not separator and name not in BUILT_IN:
            raise ValueError(
                f"no built-in reward function of that name{nearest(name, BUILT_IN)}; "
                "one of yours is named path/to/file.py:function or package.module:function"
            )
        module = r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*"
        if separator and not (function.isidentifier() and (place.endswith(".py") or re.fullmatch(module, place))):
            raise ValueError("want path/to/file.py:function or package.module:function")
        return name

    @model_validator(mode="after")
    def _defined(self) -> Self:
        if self.source is not None:
            if self.path is None:
                raise ValueError(f"source goes with a name of the form file.py:function, not with {self.name}")
            check_source(self.source, self.name)
        return self


class RewardSettings(Settings):
    """Settings of the reward stage."""

    functions: tuple[RewardFunction, ...] = Field(default=(RewardFunction(name="numeric_match"),), min_length=1)
    """Reward functions; the total is the weighted sum of the scores of those that apply to a completion."""
    timeout_seconds: float = Field(default=10.0, gt=0)
    """Longest a function may take over one completion; then its process is killed and the completion is an error."""
    batch_timeout_seconds: float = Field(default=60.0, gt=0)
    """Longest a function may take over a batch; then the batch is scored one completion at a time."""
    batch_size: int = Field(default=256, ge=1)
    """Completions a call; the groups of a prompt stay whole, so that functions may compare within a group."""
    num_workers: int | None = Field(default=None, ge=1)
    """Worker processes that score at once; as many as there are usable cores when absent."""
    memory_gb: float = Field(default=8.0, gt=0)
    """Address space of a worker process, in GiB; a completion that needs more is an error."""
    error_score: float = Field(default=0.0, allow_inf_nan=False)
    """Score a function gives a completion on which it raised, hung, crashed or returned no finite number."""
    max_lost_workers: int = Field(default=100, ge=1)
    """Hangs and crashes after which the stage gives up: so many are the function's fault, not the completions'."""
    max_error_share: float = Field(default=0.5, ge=0, le=1)
    """Share of an iteration's completions that a function may fail on; on more, the stage fails with what was raised:
    the function or its arguments are at fault, and nothing would be learnt. 1 lets every completion fail."""
    allow_network: bool = False
    """Let reward functions reach the network, for a judge inside the cluster; credentials stay out of reach."""
    read_paths: tuple[str, ...] = ()
    """Files and folders that reward functions may read, beside Python and its packages."""

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        counts = Counter(function.title for function in self.functions)
        repeated = [title for title, count in counts.items() if count > 1]
        if repeated:
            raise ValueError(f"two reward functions are called {repeated[0]}: give one of them another label")
        if not any(function.weight for function in self.functions):
            raise ValueError("every reward function has weight 0: nothing would be learnt; give one a weight")
        if self.timeout_seconds > self.batch_timeout_seconds:
            raise ValueError(
                f"batch_timeout_seconds must be at least timeout_seconds ({self.timeout_seconds:g}), "
                f"got {self.batch_timeout_seconds:g}"
            )
        return self

    def embedded(self, folder: Path) -> "RewardSettings":
        """These settings with the text of every file of reward functions inside; paths are relative to `folder`.

        Raises:
            SettingsError: a file is missing, is no Python, or does not define its function.
        """
        functions = [_embed(function, folder) for function in self.functions]
        return self.model_copy(update={"functions": tuple(functions)})


def _embed(function: RewardFunction, folder: Path) -> RewardFunction:
    if function.path is None or function.source is not None:
        return function
    try:
        source = (folder / function.path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise SettingsError(f"reward function {function.name}: {folder / function.path}: {reason}") from None
    try:
        check_source(source, function.name)
    except ValueError as error:
        raise SettingsError(f"reward function {function.name}: {error}") from None
    return function.model_copy(update={"source": source})


def check_source(source: str, name: str) -> None:
    """Checks, without running it, that a file defines the function that `name` points to.

    Raises:
        ValueError: not Python, or no such name at the top level; with the nearest name there is.
    """
    place, _, function = name.rpartition(":")
    try:
        tree = ast.parse(source)
    except SyntaxError as error:
        raise ValueError(f"{place} is not Python: line {error.lineno}: {error.msg}") from None
    defined = _defined_names(tree)
    if function not in defined and "*" not in defined:
        raise ValueError(f"{place} does not define {function}{nearest(function, defined)}")


def _defined_names(tree: ast.Module) -> set[str]:
    """Names a module binds, at any depth of its top-level statements; `*` when it imports all of another."""
    names: set[str] = set()
    statements: list[ast.AST] = list(tree.body)
    while statements:
        node = statements.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names.update(alias.asname or alias.name for alias in node.names)
        else:
            stored = (part for part in ast.walk(node) if isinstance(part, ast.Name))
            names.update(part.id for part in stored if isinstance(part.ctx, ast.Store))
            statements.extend(child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt))
    return names
