"""The objects of every overlay, as `k8s/render.sh` wrote them."""

import copy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

K8S = Path(__file__).parents[2] / "k8s"
OVERLAYS = sorted(path.name for path in (K8S / "overlays").iterdir())
Object = dict[str, Any]

POD_TEMPLATES = {
    "Deployment": "spec.template",
    "StatefulSet": "spec.template",
    "CronJob": "spec.jobTemplate.spec.template",
    "TrainingRuntime": "spec.template.spec.replicatedJobs.0.template.spec.template",
}
"""Where each kind that makes pods keeps their template."""


def at(value: Any, path: str) -> Any:
    """The value at a dotted path; a number indexes a list."""
    for part in path.split("."):
        value = value[int(part)] if isinstance(value, list) else value[part]
    return value


@pytest.fixture(scope="session")
def k8s() -> Path:
    return K8S


@pytest.fixture(scope="session", params=OVERLAYS)
def overlay(request: pytest.FixtureRequest) -> str:
    return request.param


@cache
def rendered(overlay: str) -> list[Object]:
    """Everything one overlay applies, read once."""
    text = (K8S / "rendered" / f"{overlay}.yaml").read_text()
    return list(yaml.load_all(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)))


@pytest.fixture(scope="session")
def objects(overlay: str) -> list[Object]:
    """Everything one overlay applies."""
    return copy.deepcopy(rendered(overlay))


@pytest.fixture(scope="session")
def pods(objects: list[Object]) -> dict[str, Object]:
    """The pod templates of an overlay, each with the namespace of what makes it, by `Kind/name`."""
    found = {}
    for item in objects:
        if item["kind"] in POD_TEMPLATES:
            template = at(item, POD_TEMPLATES[item["kind"]])
            found[f"{item['kind']}/{item['metadata']['name']}"] = {
                **template,
                "namespace": item["metadata"]["namespace"],
            }
    return found


@pytest.fixture(scope="session")
def containers(pods: dict[str, Object]) -> dict[str, Object]:
    """Every container of every pod, init containers too, by `Kind/name/container`."""
    return {
        f"{owner}/{container['name']}": container
        for owner, pod in pods.items()
        for container in pod["spec"].get("initContainers", []) + pod["spec"]["containers"]
    }
