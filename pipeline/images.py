"""Which image a stage runs in: by digest from `images/lock.json`, which `make images` writes."""

import json
from pathlib import Path

from components.common.errors import SettingsError
from pipeline.resources import STAGES, ClusterSettings

IMAGE_OF = {"rollout": "rollout", "update": "update"}
"""Stages with an image of their own; the others share `cpu`."""
LOCK = Path(__file__).parents[1] / "images" / "lock.json"


def pinned(cluster: ClusterSettings) -> ClusterSettings:
    """The same settings with every stage's image named: what travels to where there is no lock file.

    Raises:
        SettingsError: a stage has none.
    """
    pods = {stage: cluster.stage(stage).model_copy(update={"image": image_of(stage, cluster)}) for stage in STAGES}
    return cluster.model_copy(update=pods)


def image_of(stage: str, cluster: ClusterSettings) -> str:
    """Reference of a stage's image: the settings' own, else the locked one.

    Raises:
        SettingsError: neither is there; the message says how to get one.
    """
    if cluster.stage(stage).image:
        return str(cluster.stage(stage).image)
    name = IMAGE_OF.get(stage, "cpu")
    try:
        return json.loads(LOCK.read_text())[name]
    except (FileNotFoundError, KeyError):
        raise SettingsError(
            f"no image for {stage}: run `make images REGISTRY=... TAG=...`, or set cluster.{stage}.image"
        ) from None
