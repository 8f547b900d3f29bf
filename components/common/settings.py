"""Settings: declared once as pydantic models, read from TOML, overridden by `--set`, refused when unknown."""

import copy
import datetime
import difflib
import json
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from components.common.errors import SettingsError

NAME_PATTERN = r"^[a-z0-9]([a-z0-9._-]{0,61}[a-z0-9])?$"
"""Names of fine-tunes and runs: they become parts of object keys and of Kubernetes labels."""


class Settings(BaseModel):
    """Base of every settings model: immutable, and an unknown name is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True)


class TrackingSettings(Settings):
    """Where metrics, reports and accepted policies are registered (MLflow)."""

    uri: str = ""
    """MLflow tracking server, or `sqlite:///file.db`; empty: `MLFLOW_TRACKING_URI` when set, else `runs/mlflow.db`."""
    experiment: str = "grpo"
    """MLflow experiment that holds the fine-tunes."""
    enabled: bool = True
    """Log to MLflow at all."""


class RunContext(Settings):
    """Which run of which fine-tune a stage works for; filled in by `configure`."""

    fine_tune: str = Field(pattern=NAME_PATTERN)
    """Name of the chain of runs."""
    run: str = Field(pattern=NAME_PATTERN)
    """Name of this run."""
    store: str
    """Object store that holds the artifacts: `file:///folder` or `s3://bucket/prefix`."""
    seed: int
    """Seed every random choice of the run derives from."""
    first_iteration: int = 0
    """Updates the start policy has had already in this fine-tune."""
    iterations: int = Field(ge=0)
    """Iterations of this run."""
    shards: int = Field(default=1, ge=1)
    """Rollout jobs an iteration is split over."""
    staleness: int = 0
    """How many updates the sampling policy may be behind the updated one."""
    tracking: TrackingSettings = TrackingSettings()
    """MLflow settings."""

    @property
    def last_iteration(self) -> int:
        """Iteration of the policy this run ends with."""
        return self.first_iteration + self.iterations


S = TypeVar("S", bound=Settings)


def validate(model: type[S], values: Mapping[str, Any], *, where: str = "settings") -> S:
    """Builds `model` from plain values; every problem is named at once.

    Raises:
        SettingsError: with a line a problem: the setting's dotted name, what was wrong, what was got.
    """
    try:
        return model.model_validate(dict(values))
    except ValidationError as error:
        raise SettingsError(_explain(model, error, where)) from None


def _explain(model: type[Settings], error: ValidationError, where: str) -> str:
    lines = []
    problems = error.errors(include_url=False)
    for problem in problems:
        if problem["type"] == "too_short" and any(_lies_in(other, problem) for other in problems):
            continue  # a list is short of the entries that were refused
        path = [str(part) for part in problem["loc"]]
        name = ".".join(path) or "(whole)"
        if problem["type"] == "extra_forbidden":
            lines.append(f"{name} is not a setting{_suggestion(model, path)}")
        elif problem["type"] == "missing":
            lines.append(f"{name} is missing; add it to the settings file")
        else:
            message = problem["msg"].removeprefix("Value error, ")
            lines += [f"{name}: {message}{_got(problem.get('input'))}"] if path else message.split("\n")
    count = f"{len(lines)} problem{'s' if len(lines) > 1 else ''}"
    return f"{where}: {count}\n" + "\n".join(f"  {line}" for line in lines)


def _lies_in(other: Mapping[str, Any], problem: Mapping[str, Any]) -> bool:
    depth = len(problem["loc"])
    return len(other["loc"]) > depth and other["loc"][:depth] == problem["loc"]


def _got(value: Any) -> str:
    if isinstance(value, Mapping):
        return ""
    if isinstance(value, datetime.date | datetime.time):  # TOML has both, no setting is one
        return f", got the date or time {value}: put it in quotes"
    return f", got {value!r}"


def _suggestion(model: type[Settings], path: Sequence[str]) -> str:
    known = {".".join(name) for name in field_paths(model)}
    named = [part for part in path if not part.isdigit()]  # without the positions in lists
    near = difflib.get_close_matches(".".join(named), known, n=1, cutoff=0.6)
    if not near:  # the right name in the wrong section
        near = [name for name in sorted(known) if name.rsplit(".", 1)[-1] == path[-1]][:1]
    return f"; did you mean {near[0]}?" if near else "; `docs/configuration.md` lists them all"


def section_model(annotation: Any) -> type[BaseModel] | None:
    """The settings model a field's type is, if it is one."""
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def entry_model(annotation: Any) -> type[BaseModel] | None:
    """The settings model each entry of a field's list is, if it is one (`[[reward.functions]]`)."""
    return section_model(get_args(annotation)[0]) if get_origin(annotation) is tuple else None


def field_paths(model: type[BaseModel], *, in_lists: bool = True) -> dict[tuple[str, ...], Any]:
    """Every field and section of a settings model: path of names → pydantic FieldInfo.

    `in_lists`: those of the entries of lists as well.
    """
    found: dict[tuple[str, ...], Any] = {}
    for name, field in model.model_fields.items():
        found[(name,)] = field
        inner = section_model(field.annotation) or (entry_model(field.annotation) if in_lists else None)
        if inner:
            found |= {(name, *path): below for path, below in field_paths(inner, in_lists=in_lists).items()}
    return found


def read_toml(path: Path) -> dict[str, Any]:
    """Reads a settings file.

    Raises:
        SettingsError: the file is missing or is not TOML; the message names line and column.
    """
    try:
        with path.open("rb") as file:
            return tomllib.load(file)
    except FileNotFoundError:
        raise SettingsError(f"{path}: no such settings file; `grpo init DIR` writes one to start from") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path} is not TOML: {error}") from None
    except OSError as error:
        raise SettingsError(f"{path} cannot be read: {error.strerror}") from None


def apply_overrides(values: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Applies `section.name=value` overrides; a value is TOML when it parses as such, text when not.

    Raises:
        SettingsError: an override without `=` or one that runs through a value that is no section.
    """
    merged = copy.deepcopy(dict(values))
    for override in overrides:
        name, separator, text = override.partition("=")
        if not separator or not name.strip():
            raise SettingsError(f"--set wants section.name=value, got {override!r}")
        *sections, last = name.strip().split(".")
        place = merged
        for section in sections:
            place = place.setdefault(section, {})
            if not isinstance(place, dict):
                raise SettingsError(f"--set {override}: {section} is a value, not a section")
        place[last] = _parse_value(text.strip())
    return merged


def _parse_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:  # a bare word: paths and names need no quotes on a command line
        return text


def dump_stage(context: RunContext, stage: Settings) -> str:
    """The one string a stage gets: its run's context and its own settings, as canonical JSON."""
    values = {"run": context.model_dump(mode="json"), "stage": stage.model_dump(mode="json")}
    return json.dumps(values, sort_keys=True, separators=(",", ":"))


def load_stage(model: type[S], settings: str) -> tuple[RunContext, S]:
    """Reads what `dump_stage` wrote: the JSON text itself, or the path of a file that holds it.

    Raises:
        SettingsError: not JSON, or not the settings of this stage.
    """
    text = settings
    if not settings.lstrip().startswith("{"):
        try:
            text = Path(settings).read_text()
        except OSError as error:
            raise SettingsError(
                f"settings: neither JSON nor a readable file: {settings[:80]!r} ({error.strerror})"
            ) from None
    try:
        values = json.loads(text)
        context, stage = values["run"], values["stage"]
    except (json.JSONDecodeError, KeyError, TypeError):
        raise SettingsError('settings: want {"run": {...}, "stage": {...}} as configure writes it') from None
    return validate(RunContext, context, where="run"), validate(model, stage, where="stage settings")
