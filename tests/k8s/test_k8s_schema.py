"""Every object against the schemas of Kubernetes 1.33 to 1.36 and of the custom resources it is made of.

Kubernetes: the PyPI package kubernetes-validate carries the strict schemas of each version. Trainer: the models
that Kubeflow Trainer publishes as kubeflow-trainer-api; a field they do not know is lost on the way through them.
Kueue and Kubeflow's PodDefault publish no schema as a package: `definitions.yaml` holds what is used of theirs. Where
$GRPO_CRD_DIR is set (`k8s/crds.sh FOLDER` fetches the pinned releases' CRDs), those count instead.
"""

import copy
import json
import os
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

DEFINITIONS = Path(__file__).with_name("definitions.yaml")
VERSIONS = ["1.33", "1.34", "1.35", "1.36"]
CUSTOM = {"trainer.kubeflow.org/v1alpha1", "kueue.x-k8s.io/v1beta2", "kubeflow.org/v1alpha1"}


@pytest.mark.parametrize("version", VERSIONS)
def test_kubernetes_accepts_every_object(k8s: Path, version: str) -> None:
    """Every different object of all overlays, once."""
    rendered = [path.read_text() for path in sorted((k8s / "rendered").glob("*.yaml"))]
    different = {json.dumps(item, sort_keys=True): item for text in rendered for item in yaml.safe_load_all(text)}
    native = [item for item in different.values() if item["apiVersion"] not in CUSTOM]
    assert len(native) > 35
    for item in native:
        assert kubernetes_validate.validate(item, version, strict=True) == version


@pytest.mark.parametrize("version", VERSIONS)
def test_pod_templates_inside_custom_resources_are_pods(pods: dict[str, dict], version: str) -> None:
    template = pods["TrainingRuntime/grpo-update"]
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "node", **template["metadata"]},
        "spec": template["spec"],
    }
    kubernetes_validate.validate(pod, version, strict=True)


def test_the_schemas_are_strict(objects: list[dict]) -> None:
    """A misspelt field and a wrong type are both refused, or the tests above would prove nothing."""
    deployment = copy.deepcopy(next(item for item in objects if item["kind"] == "Deployment"))
    container = deployment["spec"]["template"]["spec"]["containers"][0]
    container["redinessProbe"] = container["readinessProbe"]
    with pytest.raises(kubernetes_validate.ValidationError, match="redinessProbe"):
        kubernetes_validate.validate(deployment, "1.36", strict=True)
    del container["redinessProbe"]
    deployment["spec"]["replicas"] = "one"
    with pytest.raises(kubernetes_validate.ValidationError, match="one"):
        kubernetes_validate.validate(deployment, "1.36", strict=True)


def lost(before: Any, after: Any, path: str = "") -> Iterator[str]:
    """Paths that are in one value and not in the other."""
    if isinstance(before, dict):
        for key, value in before.items():
            if not isinstance(after, dict) or key not in after:
                yield f"{path}.{key}"
            else:
                yield from lost(value, after[key], f"{path}.{key}")
    elif isinstance(before, list):
        for index, (one, other) in enumerate(zip(before, after, strict=True)):
            yield from lost(one, other, f"{path}[{index}]")


def test_trainer_knows_every_field_of_the_runtime(objects: list[dict]) -> None:
    from kubeflow_trainer_api.models.trainer_v1alpha1_training_runtime import TrainerV1alpha1TrainingRuntime

    (runtime,) = [item for item in objects if item["kind"] == "TrainingRuntime"]
    assert list(lost(runtime, TrainerV1alpha1TrainingRuntime.from_dict(runtime).to_dict())) == []
    wrong = copy.deepcopy(runtime)
    wrong["spec"]["mlPolicy"]["nodes"] = 2
    assert list(lost(wrong, TrainerV1alpha1TrainingRuntime.from_dict(wrong).to_dict())) == [".spec.mlPolicy.nodes"]


def closed(schema: Any) -> Any:
    """A definition's schema with unknown fields refused, as `kubectl apply --validate=strict` refuses them."""
    if isinstance(schema, list):
        return [closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    result = {key: closed(value) for key, value in schema.items()}
    if result.pop("x-kubernetes-int-or-string", False):
        pattern = {"pattern": schema["pattern"]} if "pattern" in schema else {}
        result = {"anyOf": [{"type": "integer"}, {"type": "string"}], **pattern}
    open_ended = schema.get("x-kubernetes-preserve-unknown-fields") or "additionalProperties" in schema
    if isinstance(schema.get("properties"), dict) and schema.get("type") == "object" and not open_ended:
        result["additionalProperties"] = False
    return result


def whole(schema: dict) -> dict:
    """A schema of a resource, closed, with the fields that every resource has."""
    common = {"apiVersion": {"type": "string"}, "kind": {"type": "string"}, "metadata": {"type": "object"}}
    return closed({**schema, "type": "object", "properties": {**schema["properties"], **common}})


@cache
def definitions() -> dict[tuple[str, str], dict]:
    """Schemas by (apiVersion, kind): those beside this file, and in their place the CRDs in $GRPO_CRD_DIR."""
    found = {}
    for name, schema in yaml.safe_load(DEFINITIONS.read_text()).items():
        api, kind = name.split()
        found[api, kind] = whole(schema)
    folder = os.environ.get("GRPO_CRD_DIR")
    for path in sorted(Path(folder).rglob("*.yaml")) if folder else []:
        for item in yaml.load_all(path.read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
            if item and item.get("kind") == "CustomResourceDefinition":
                spec = item["spec"]
                for version in spec["versions"]:
                    key = f"{spec['group']}/{version['name']}", spec["names"]["kind"]
                    found[key] = whole(version["schema"]["openAPIV3Schema"])
    return found


def test_custom_resources_meet_their_definitions(objects: list[dict]) -> None:
    """All but the TrainingRuntime, which has a test of its own above; with Trainer's CRDs at hand, that too."""
    for item in (item for item in objects if item["apiVersion"] in CUSTOM):
        key = item["apiVersion"], item["kind"]
        if key in definitions() or item["kind"] != "TrainingRuntime":
            jsonschema.validate(item, definitions()[key])


def test_the_definitions_are_those_of_the_pinned_releases() -> None:
    pinned = (DEFINITIONS.parents[2] / "k8s/third-party/versions.env").read_text()
    head = DEFINITIONS.read_text().split("\n\n")[0]
    for name in ("KUEUE_VERSION", "DASHBOARD_VERSION"):
        (version,) = re.findall(rf"^{name}=(.+)$", pinned, re.MULTILINE)
        assert version in head, f"{name} is {version}: compare tests/k8s/definitions.yaml with that release's"


@pytest.mark.parametrize(
    ("kind", "place", "value", "told"),
    [
        ("ClusterQueue", "spec.queueingStrategy", "Fifo", "Fifo"),
        ("ClusterQueue", "spec.resourceGroups.0.flavors.0.resources.0.nominalQuota", "many", "many"),
        ("ClusterQueue", "spec.cohort", "c", "cohort"),  # the name it had in v1beta1
        ("LocalQueue", "spec.clusterQueue", "Not A Name", "Not A Name"),
        ("ResourceFlavor", "spec.labels", {}, "labels"),
        ("PodDefault", "spec.environment", [], "environment"),
    ],
)
def test_what_a_release_would_refuse_is_refused(kind: str, place: str, value: Any, told: str) -> None:
    objects = yaml.safe_load_all((DEFINITIONS.parents[2] / "k8s/rendered/gpu.yaml").read_text())
    item = next(item for item in objects if item["kind"] == kind)
    *way, last = place.split(".")
    inner = item
    for part in way:
        inner = inner[int(part)] if isinstance(inner, list) else inner.setdefault(part, {})
    inner[last] = value
    with pytest.raises(jsonschema.ValidationError, match=told):
        jsonschema.validate(item, definitions()[item["apiVersion"], kind])


@pytest.mark.parametrize("version", VERSIONS)
def test_what_a_pod_default_adds_makes_a_pod(version: str) -> None:
    objects = yaml.safe_load_all((DEFINITIONS.parents[2] / "k8s/rendered/profile.yaml").read_text())
    (spec,) = [item["spec"] for item in objects if item["kind"] == "PodDefault"]
    container = {"name": "main", "image": "a:1", "env": spec["env"], "volumeMounts": spec["volumeMounts"]}
    pod = {"containers": [container], "volumes": spec["volumes"]}
    kubernetes_validate.validate(
        {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a"}, "spec": pod}, version, strict=True
    )


def test_unknown_fields_of_a_custom_resource_are_refused() -> None:
    """The closing of a schema, on a definition small enough to read."""
    schema = closed(
        {
            "type": "object",
            "properties": {
                "spec": {
                    "type": "object",
                    "properties": {
                        "quota": {"x-kubernetes-int-or-string": True},
                        "labels": {"type": "object", "additionalProperties": {"type": "string"}},
                    },
                }
            },
        }
    )
    jsonschema.validate({"spec": {"quota": "1Ti", "labels": {"any": "thing"}}}, schema)
    jsonschema.validate({"spec": {"quota": 8}}, schema)
    with pytest.raises(jsonschema.ValidationError, match="qouta"):
        jsonschema.validate({"spec": {"qouta": 8}}, schema)
