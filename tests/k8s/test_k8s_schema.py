"""Every object against the schemas of Kubernetes 1.33 to 1.36 and of the custom resources it is made of.

Kubernetes: the PyPI package kubernetes-validate carries the strict schemas of each version. Trainer: the models
that Kubeflow Trainer publishes as kubeflow-trainer-api; a field they do not know is lost on the way through them.
Kueue and Kubeflow's PodDefault publish no schema as a package: their CRDs are read from $GRPO_CRD_DIR where it is
set (`k8s/crds.sh FOLDER` fetches the pinned releases'), and the test says that it was skipped where it is not.
"""

import copy
import json
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

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
    """A CRD's schema with unknown fields refused, as `kubectl apply --validate=strict` refuses them."""
    if isinstance(schema, list):
        return [closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    result = {key: closed(value) for key, value in schema.items()}
    if result.pop("x-kubernetes-int-or-string", False):
        result = {"anyOf": [{"type": "integer"}, {"type": "string"}]}
    open_ended = schema.get("x-kubernetes-preserve-unknown-fields") or "additionalProperties" in schema
    if isinstance(schema.get("properties"), dict) and schema.get("type") == "object" and not open_ended:
        result["additionalProperties"] = False
    return result


@cache
def definitions(folder: Path) -> dict[tuple[str, str], dict]:
    """Schemas of the CRDs in a folder of YAML files, by (apiVersion, kind)."""
    found = {}
    for path in sorted(folder.rglob("*.yaml")):
        for item in yaml.load_all(path.read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
            if item and item.get("kind") == "CustomResourceDefinition":
                spec = item["spec"]
                for version in spec["versions"]:
                    api = f"{spec['group']}/{version['name']}"
                    schema = closed(version["schema"]["openAPIV3Schema"])
                    schema["properties"]["metadata"] = {"type": "object"}
                    found[api, spec["names"]["kind"]] = schema
    return found


def test_custom_resources_meet_their_definitions(objects: list[dict]) -> None:
    folder = os.environ.get("GRPO_CRD_DIR")
    if not folder:
        pytest.skip("no package carries Kueue's and PodDefault's schemas: k8s/crds.sh DIR, then GRPO_CRD_DIR=DIR")
    known = definitions(Path(folder))
    checked = 0
    for item in objects:
        if (item["apiVersion"], item["kind"]) in known:
            jsonschema.validate(item, known[item["apiVersion"], item["kind"]])
            checked += 1
    assert checked == sum(item["apiVersion"] in CUSTOM for item in objects), f"{folder} lacks some of the definitions"


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
