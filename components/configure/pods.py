"""Pods of the GPU stages, as far as a run may vary them: parameters of the Kubeflow form beside the settings.

`[cluster.rollout] cpu` is the parameter `rollout_pod_cpu`: the UI sorts by name, so a stage's stand together. On this
machine they are blank, and nobody reads them.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field

from components.common.settings import Settings

QUANTITY = r"^[0-9]+(\.[0-9]+)?(m|k|Ki|M|Mi|G|Gi|T|Ti)?$"
STAGES = ("rollout", "update")
KINDS: dict[str, type] = {"node_selector": dict, "tolerations": list}
"""What is no text; a number would silently drop the limit on GPUs, so `gpus` is text too."""


class Toleration(Settings):
    """A taint a pod accepts."""

    key: str
    """Key of the taint."""
    operator: Literal["Exists", "Equal"] = "Exists"
    """`Equal` compares the value too."""
    value: str | None = None
    """Value of the taint, with `Equal`."""
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None
    """Effect of the taint; unset: every effect."""


class Pod(Settings):
    """What of a stage's pod is a parameter of the run."""

    image: str | None = Field(default=None, min_length=1)
    """Container image; unset: the one of this stage in `images/lock.json`."""
    cpu: str = Field(default="1", pattern=QUANTITY)
    """CPUs requested."""
    memory: str = Field(default="2Gi", pattern=QUANTITY)
    """Memory requested, and its limit."""
    gpus: int = Field(default=0, ge=0, le=16)
    """GPUs of a pod."""
    gpu_resource: str = Field(default="nvidia.com/gpu", min_length=1)
    """Name of the GPU resource."""
    node_selector: dict[str, str] = {}
    """More node labels the pod wants."""
    tolerations: tuple[Toleration, ...] = ()
    """More taints the pod accepts."""


WHOLE = {"node_selector": "Labels the pod's node must have.", "tolerations": "Taints the pod accepts."}
"""In the form these are whole, with what preset, `gpu_type` and `spot` come to; the run after it, in a chain or
resumed, accepts the taint of the preset's GPU nodes all the same."""


@dataclass(frozen=True)
class PodField:
    """One parameter of the form."""

    stage: str
    setting: str
    kind: type
    description: str

    @property
    def name(self) -> str:
        """Name of the parameter."""
        return f"{self.stage}_pod_{self.setting}"


def pod_fields() -> Iterator[PodField]:
    """Parameters of both stages' pods."""
    for stage in STAGES:
        for setting, field in Pod.model_fields.items():
            description = WHOLE.get(setting) or (field.description or "").partition(";")[0].rstrip(".") + "."
            yield PodField(stage, setting, KINDS.get(setting, str), description)


def by_stage(values: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Values by parameter name, as settings of the stages' pods; a stage that is blank is left out."""
    found: dict[str, dict[str, Any]] = {}
    for field in pod_fields():
        if field.name in values:
            found.setdefault(field.stage, {})[field.setting] = values[field.name]
    return {stage: given for stage, given in found.items() if any(given.values())}


class Pods(Settings):
    """The pods of the form."""

    rollout: Pod = Pod()
    update: Pod = Pod()


class Form(Settings):
    """What of the form is no setting of a stage, to be checked with the settings before a GPU is asked for."""

    cluster: Pods
