"""Finds a reward function by its name and what it wants. Runs in a worker: a user's module is code, and not ours."""

import importlib
import inspect
import sys
import types
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from components.reward.names import BUILT_IN, nearest

Function = Callable[..., Any]


class NotUsable(Exception):
    """The function cannot be used at all; the message says why."""


@dataclass(frozen=True)
class Parameters:
    """Names a function is called with: those it must have, those it may have, and whether it takes any others."""

    required: tuple[str, ...]
    optional: tuple[str, ...]
    any: bool

    def as_json(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)


def load(name: str, source: str | None) -> Function:
    """The function `name` stands for.

    Raises:
        NotUsable: no such module or function, it is not callable, or its module fails while it is imported.
    """
    place, _, function = BUILT_IN.get(name, name).rpartition(":")
    try:
        module = importlib.import_module(place) if source is None else _from_source(place, source)
    except ModuleNotFoundError as error:
        raise NotUsable(f"{place} cannot be imported: {error}; install it, or check the name") from None
    except (Exception, SystemExit) as error:  # a user's module may do anything while it is imported
        raise NotUsable(f"{place} failed while it was imported: {type(error).__name__}: {error}") from None
    found = getattr(module, function, None)
    if found is None:
        public = [other for other, value in vars(module).items() if callable(value) and not other.startswith("_")]
        raise NotUsable(f"{place} does not define {function}{nearest(function, public)}")
    if not callable(found):
        raise NotUsable(f"{name} is a {type(found).__name__}, want a function")
    return found


def _from_source(place: str, source: str) -> types.ModuleType:
    module = types.ModuleType("user_rewards")
    module.__file__ = place
    sys.modules[module.__name__] = module  # dataclasses and the like look their module up
    exec(compile(source, place, "exec"), module.__dict__)
    return module


def parameters(function: Function) -> Parameters:
    """What a function wants to be called with."""
    try:
        found = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # some builtins have no signature
        return Parameters((), (), any=True)
    named = [part for part in found if part.kind in (part.POSITIONAL_OR_KEYWORD, part.KEYWORD_ONLY)]
    return Parameters(
        required=tuple(part.name for part in named if part.default is part.empty),
        optional=tuple(part.name for part in named if part.default is not part.empty),
        any=any(part.kind is part.VAR_KEYWORD for part in found),
    )


FROM_RECORDS = {"prompts": "prompt", "completions": "completion", "completion_ids": "completion_ids"}
"""Parameters every function is offered: name → column of the completions."""
ON_REQUEST = ("prompt_id", "prompt_ids", "sample_index", "finish_reason")
"""Columns that a function gets when its signature names them."""


def bind(
    wanted: Parameters, data: list[str], renamed: Mapping[str, str], arguments: Mapping[str, Any]
) -> dict[str, str]:
    """Which column each parameter of a function gets; `data` are the data set's own columns.

    Raises:
        NotUsable: it wants something that is not there, or is given something it does not take.
    """
    for parameter, column in renamed.items():
        if column not in data:
            raise NotUsable(
                f"columns: {parameter} = {column!r}: the data set has no such column{nearest(column, data)}"
            )
    offered = FROM_RECORDS | {name: name for name in data} | dict(renamed)
    named = {*wanted.required, *wanted.optional}
    for parameter in [*arguments, *renamed]:
        if parameter not in named and not wanted.any:
            raise NotUsable(f"it takes no argument {parameter}{nearest(parameter, named)}")
    chosen = {name: column for name, column in offered.items() if wanted.any or name in named}
    chosen |= {name: name for name in ON_REQUEST if name in named and name not in chosen}
    chosen = {name: column for name, column in chosen.items() if name not in arguments}
    lacking = [name for name in wanted.required if name not in chosen and name not in arguments]
    if lacking:
        raise NotUsable(
            f"it wants {', '.join(lacking)}: neither a column of the data set{nearest(lacking[0], data)} nor among "
            f'its arguments; map one with columns = {{{lacking[0]} = "..."}}'
        )
    if not chosen:
        raise NotUsable(f"it takes none of {', '.join([*FROM_RECORDS, *data])}, so it has nothing to score")
    return chosen
