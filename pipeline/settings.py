"""The settings file: the run's settings and where its stages run."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from components.common.settings import apply_overrides, read_toml, validate
from components.configure.config import RunSettings
from pipeline.resources import ClusterSettings


class PipelineSettings(RunSettings):
    """A whole settings file."""

    cluster: ClusterSettings = ClusterSettings()
    """Pods, on a cluster."""


def load(path: Path, overrides: Sequence[str] = ()) -> PipelineSettings:
    """Reads a settings file, lays `--set` overrides over it, and checks all of it.

    A value that starts with `./` or `../` is a path beside the settings file. A reward function `file.py:name` is read
    here and travels with the settings, so that it is at hand where the reward stage runs.

    Raises:
        SettingsError: with every problem at once.
    """
    values = _relative_to(apply_overrides(read_toml(path), overrides), path.resolve().parent)
    values["store"] = store_url(values.get("store", RunSettings.model_fields["store"].default))
    settings = validate(PipelineSettings, values, where=str(path))
    return settings.model_copy(update={"reward": settings.reward.embedded(path.resolve().parent)})


def store_url(text: Any) -> Any:
    """A plain path as `file://` URL; URLs as they are."""
    return text if not isinstance(text, str) or "://" in text else Path(text).resolve().as_uri()


def _relative_to(value: Any, folder: Path) -> Any:
    if isinstance(value, dict):
        return {name: _relative_to(inner, folder) for name, inner in value.items()}
    if isinstance(value, list):
        return [_relative_to(inner, folder) for inner in value]
    if isinstance(value, str) and value.startswith(("./", "../")):
        name, separator, rest = value.partition(":")
        return str((folder / name).resolve()) + separator + rest
    return value
