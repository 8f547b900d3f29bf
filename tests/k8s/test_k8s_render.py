"""What is committed under k8s/rendered is what the sources build."""

import hashlib
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml


def test_every_overlay_is_rendered_from_the_present_sources(k8s: Path, overlay: str) -> None:
    """The digest in the header, recomputed: `sha256sum` lines of all sources in byte order, hashed again."""
    sources = [path for folder in ("base", "components", "overlays") for path in (k8s / folder).rglob("*.yaml")]
    lines = [
        f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.relative_to(k8s)}\n"
        for path in sorted(sources, key=lambda path: str(path.relative_to(k8s)).encode())
    ]
    digest = hashlib.sha256("".join(lines).encode()).hexdigest()
    header = (k8s / "rendered" / f"{overlay}.yaml").read_text().splitlines()[1]
    assert header == f"# sources: {digest}", "k8s/ changed since it was rendered: run k8s/render.sh"


def test_rendered_objects_are_what_kustomize_builds(k8s: Path, overlay: str) -> None:
    if shutil.which("kustomize"):
        command = ["kustomize", "build"]
    elif shutil.which("kubectl"):
        command = ["kubectl", "kustomize"]
    else:
        pytest.skip("neither kubectl nor kustomize is installed; the digest test still notices stale renders")
    built = subprocess.run([*command, str(k8s / "overlays" / overlay)], check=True, capture_output=True, text=True)
    committed = (k8s / "rendered" / f"{overlay}.yaml").read_text()
    assert list(yaml.safe_load_all(built.stdout)) == list(yaml.safe_load_all(committed))


def test_every_component_and_base_is_used_or_offered(k8s: Path) -> None:
    """A folder that no kustomization lists is dead, unless the operator is told to list it."""
    listed = " ".join(path.read_text() for path in (k8s / "overlays").rglob("kustomization.yaml"))
    documented = (k8s.parent / "docs/cluster.md").read_text()
    for folder in [*(k8s / "base").iterdir(), *(k8s / "components").iterdir()]:
        name = f"{folder.parent.name}/{folder.name}"
        assert name in listed or name in documented, f"k8s/{name} is in no overlay and not in docs/cluster.md"


def test_local_objects_are_not_applied(objects: list[dict]) -> None:
    assert "grpo-site" not in {item["metadata"]["name"] for item in objects}


@pytest.mark.parametrize(("overlay_name", "namespace"), [("profile", "grpo"), ("standalone", "kubeflow")])
def test_every_component_can_be_listed(k8s: Path, tmp_path: Path, overlay_name: str, namespace: str) -> None:
    """An overlay with all opt-in components builds, and what they add lands in the namespace of the runs."""
    if not shutil.which("kubectl"):
        pytest.skip("kubectl is not installed: nothing here can build a new overlay")
    copy = tmp_path / "k8s"
    shutil.copytree(k8s, copy, ignore=shutil.ignore_patterns("rendered", "kind", "third-party"))
    path = copy / "overlays" / overlay_name / "kustomization.yaml"
    content = yaml.safe_load(path.read_text())
    optional = ["hub-egress", "external-object-storage", "shared-cache"]
    content["components"] = [f"../../components/{name}" for name in optional] + content["components"]
    path.write_text(yaml.safe_dump(content))
    done = subprocess.run(["kubectl", "kustomize", str(path.parent)], check=True, capture_output=True, text=True)
    added = {(item["kind"], item["metadata"]["name"]): item for item in yaml.safe_load_all(done.stdout)}
    for kind, name in [("NetworkPolicy", "grpo-hub-egress"), ("NetworkPolicy", "grpo-external-object-storage"),
                       ("PersistentVolumeClaim", "grpo-cache")]:  # fmt: skip
        assert added[kind, name]["metadata"]["namespace"] == namespace
    assert added["NetworkPolicy", "external-object-storage"]["metadata"]["namespace"] == "grpo-tracking"
    assert "AWS_ENDPOINT_URL_S3" not in added["ConfigMap", "grpo-config"]["data"]
    assert "MLFLOW_S3_ENDPOINT_URL" not in added["ConfigMap", "mlflow"]["data"]
    node = added["TrainingRuntime", "grpo-update"]["spec"]["template"]["spec"]["replicatedJobs"][0]
    (cache,) = [item for item in node["template"]["spec"]["template"]["spec"]["volumes"] if item["name"] == "cache"]
    assert cache["persistentVolumeClaim"] == {"claimName": "grpo-cache"}
