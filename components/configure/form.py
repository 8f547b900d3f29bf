"""The run's settings as a flat form: what the Kubeflow UI asks for and what `configure` gets back.

A field `update.learning_rate` becomes the parameter `update_learning_rate`: the UI sorts parameters by name, so a
stage's stand together. What shapes the graph itself is fixed when it is compiled and has no parameter.
"""

import copy
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel

from components.common.settings import field_paths, section_model

STRUCTURAL = ("iterations", "shards", "staleness", "skip_unchanged_data", "update.nodes")
"""Settings that decide which tasks there are, and what pods they get."""


@dataclass(frozen=True)
class FormField:
    """One parameter of the form. `kind` is its KFP type; an `optional` one is unset when its text is blank."""

    path: tuple[str, ...]
    kind: type
    description: str
    optional: bool = False
    choices: tuple[Any, ...] = ()

    @property
    def name(self) -> str:
        """Name of the parameter."""
        return "_".join(self.path)

    @property
    def dotted(self) -> str:
        """Name of the setting."""
        return ".".join(self.path)

    def default(self, values: Mapping[str, Any]) -> Any:
        """The form's default, from settings as plain values."""
        for part in self.path:
            values = values[part]
        if values is None:
            return ""
        return str(values) if self.kind is str else _without_none(values)


def form_fields(model: type[BaseModel]) -> Iterator[FormField]:
    """The form of a settings model, in the order of its fields."""
    for path, field in field_paths(model, in_lists=False).items():
        annotation = field.annotation
        if ".".join(path) in STRUCTURAL or section_model(annotation):
            continue
        optional = get_origin(annotation) in (Union, types.UnionType) and type(None) in get_args(annotation)
        if optional:
            annotation = next(part for part in get_args(annotation) if part is not type(None))
        choices = get_args(annotation) if get_origin(annotation) is Literal else ()
        if choices and optional:
            choices = ("", *choices)  # Kubeflow refuses a default that is not among the choices
        kind = str if optional else _kfp_type(annotation)
        yield FormField(path, kind, (field.description or "").strip(), optional, choices)


def overlay(base: Mapping[str, Any], values: Mapping[str, Any], model: type[BaseModel]) -> dict[str, Any]:
    """Nested settings `base` with form values (dotted name → value) laid over them.

    A value that is the form's own default changes nothing; a blank unsets an optional field. KFP makes every number
    inside a list or a dictionary a float: a whole one is an integer again, unless `base` has a float in its place.
    """
    fields = {field.dotted: field for field in form_fields(model)}
    merged = copy.deepcopy(dict(base))
    for dotted, value in values.items():
        field = fields.get(dotted)
        if field and _is_default(field, value, base):
            continue
        *sections, last = dotted.split(".")
        place = merged
        for section in sections:
            place = place.setdefault(section, {})
        blank = field is not None and field.optional and value in ("", None)
        place[last] = None if blank else _whole(value, place.get(last))
    return merged


def _is_default(field: FormField, value: Any, base: Mapping[str, Any]) -> bool:
    try:
        return field.default(base) == value
    except KeyError:  # settings that leave this one out
        return False


def _whole(value: Any, present: Any) -> Any:
    if isinstance(value, Mapping):
        known = present if isinstance(present, Mapping) else {}
        return {name: _whole(inner, known.get(name)) for name, inner in value.items()}
    if isinstance(value, list):
        known = [*present] if isinstance(present, list | tuple) else []
        known += [None] * len(value)
        return [_whole(inner, before) for inner, before in zip(value, known, strict=False)]
    is_whole = isinstance(value, float) and value.is_integer() and not isinstance(present, float)
    return int(value) if is_whole else value


def _kfp_type(annotation: Any) -> type:
    origin = get_origin(annotation) or annotation
    if origin is Literal:
        return type(get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        return str
    if origin in (bool, int, float, str):
        return origin
    if origin in (list, tuple, set, frozenset):
        return list
    return dict if origin in (dict, Mapping) else str


def _without_none(value: Any) -> Any:
    """KFP refuses null inside lists and dictionaries; what is unset is left out."""
    if isinstance(value, Mapping):
        return {name: _without_none(inner) for name, inner in value.items() if inner is not None}
    return [_without_none(inner) for inner in value] if isinstance(value, list | tuple) else value
