"""Every step of the kind cluster, run for real in a copy of the repository against programs that record and answer.

`kind`, `docker`, `kubectl`, `helm`, `curl` and `grpo` are stubs; the shell, jq, git and the scripts' Python are real.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from components.common import champion
from components.common.store import open_store

ROOT = Path(__file__).parents[2]
FOLDERS = ("pipeline", "components", "images", "requirements", "scripts", "k8s", "recipes")
FILES = ("pyproject.toml", "README.md", "LICENSE")

KUBECTL = """
case "$*" in
*"get secret mlpipeline-minio-artifact"*) printf Z2l2ZW4= ;;
"get secret "*) exit 1 ;;
*"allocatable.nvidia"*) printf "2 2" ;;
*"get trainjobs"*) [ -f "$STATE/cancelled" ] || echo trainjob/grpo-1 ;;
*"get pods"*) [ -f "$STATE/cancelled" ] || echo pod/update-1 ;;
esac"""
CURL = """
case "$*" in
*experiments/get-by-name*) echo '{"experiment": {"experiment_id": "7"}}' ;;
*runs/search*) echo "{\\"runs\\": [{\\"data\\": {\\"metrics\\": [{\\"key\\": \\"$METRIC\\", \\"value\\": 0.5}]}}]}" ;;
*/apis/v2beta1/experiments*) name=$(cat "$STATE/fine_tune")
  echo "{\\"experiments\\": [{\\"display_name\\": \\"grpo-$name\\", \\"experiment_id\\": \\"e1\\"}]}" ;;
*/apis/v2beta1/runs*experiment_id=e1*) cat "$STATE/runs" ;;
esac"""
GRPO = """
for word; do case "$word" in fine_tune=*) printf %s "${word#fine_tune=}" > "$STATE/fine_tune" ;; esac; done
[ "$1" != cancel ] || touch "$STATE/cancelled"
"""
PYTHON = """
import runpy, sys
import components.common.store as store
real = store.open_store
store.open_store = lambda url: real("file://{store}")
if sys.argv[1] == "-":
    sys.argv = sys.argv[1:]
    exec(compile(sys.stdin.read(), "heredoc", "exec"), {{"__name__": "__main__"}})
"""
"""Runs what a script pipes into Python, on a store in a folder; a program given by path is only recorded."""
needs_jq = pytest.mark.skipif(not shutil.which("jq"), reason="the scripts that ask the cluster need jq")
ONE_RUN = {"runs": [{"run_id": "r1", "display_name": "grpo-kind-schedule-1764181-1-99", "state": "SUCCEEDED"}]}


@dataclass
class Copy:
    """The repository and the stubs, in a folder."""

    root: Path
    state: Path
    environment: dict[str, str]

    def run(self, script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        command = [self.root / "k8s/kind" / script, *arguments]
        return subprocess.run(command, env=self.environment | environment, capture_output=True, text=True)

    def calls(self, program: str) -> list[str]:
        lines = (self.state / "calls").read_text().splitlines()
        return [line.partition(" ")[2] for line in lines if line.split()[0] == program]


@pytest.fixture
def copy(tmp_path: Path) -> Copy:
    root, state, programs = tmp_path / "repository", tmp_path / "state", tmp_path / "bin"
    state.mkdir()
    programs.mkdir()
    ignore = shutil.ignore_patterns("__pycache__", "build", "rendered")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, root / name, ignore=ignore)
    for name in FILES:
        shutil.copy(ROOT / name, root / name)
    git = ["git", "-C", root, "-c", "user.name=t", "-c", "user.email=t@example.com"]
    for command in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "--message", "all"]):
        subprocess.run([*git, *command], check=True)
    for name, body in {"kubectl": KUBECTL, "curl": CURL, "grpo": GRPO, "kind": "", "docker": "", "helm": ""}.items():
        stub(programs / name, state, f"{name} $*", body)
    stub(programs / "sleep", state, "sleep $*", "")
    (state / "driver.py").write_text(PYTHON.format(store=state / "store"))
    stub(programs / "python", state, "python $*", f'exec {sys.executable} {state / "driver.py"} "$@"')
    (state / "runs").write_text(json.dumps(ONE_RUN))
    return Copy(root, state, {
        "PATH": f"{programs}:{os.environ['PATH']}", "HOME": str(tmp_path), "PYTHONPATH": str(ROOT), "METRIC": "reward",
        "GRPO": str(programs / "grpo"), "GRPO_PYTHON": str(programs / "python"), "STATE": str(state),
    })  # fmt: skip


def stub(path: Path, state: Path, line: str, body: str) -> None:
    path.write_text(f'#!/bin/sh\necho "{line}" >> {state}/calls\n{body}\n')
    path.chmod(0o755)


def crown(copy: Copy, fine_tune: str) -> None:
    """Makes the store hold a champion."""
    found = champion.Champion(
        manifest="m", digest="d", evaluation="e", evaluation_digest="x", run="r", iteration=1, metric="pass@1",
        value=0.9, accepted="2026-01-01T00:00:00Z",
    )  # fmt: skip
    champion.write(open_store(f"file://{copy.state / 'store'}"), fine_tune, found)


def test_every_step_of_up_runs_to_its_end(copy: Copy) -> None:
    done = copy.run("up.sh")
    assert done.returncode == 0, done.stderr
    assert "ready: make kind-test" in done.stdout
    calls = copy.calls("kubectl")
    used = next(number for number, call in enumerate(calls) if call == "config use-context kind-grpo")
    assert all(call.startswith("--context kind-grpo ") for call in calls[:used])
    applied = [call.split("--kustomize ")[1] for call in calls if "--kustomize" in call]
    assert [Path(path).relative_to(copy.root / "k8s").as_posix() for path in applied] == [
        "third-party/kfp/cluster-scoped", "third-party/kfp", "third-party/trainer", "overlays/kind",
    ]  # fmt: skip
    assert all((Path(path) / "kustomization.yaml").exists() for path in applied)


def test_images_are_built_for_any_machine_locked_and_loaded(copy: Copy) -> None:
    """No folder is there before; torch's release is the locked one, found by backend and not as a local version."""
    done = copy.run("20-images.sh")
    assert done.returncode == 0, done.stderr
    builds = [call for call in copy.calls("docker") if call.startswith("build ")]
    assert [call.split("--tag ")[1].split()[0] for call in builds] == [
        f"localhost/grpo-pipeline-{name}:kind" for name in ("cpu", "tracking", "update")
    ]
    (torch,) = [line for line in (ROOT / "requirements/torch.txt").read_text().splitlines() if line.startswith("torch")]
    assert f"--build-arg TORCH={torch} --build-arg TORCH_BACKEND=cpu " in builds[2] and "+cpu" not in builds[2]
    declared = re.findall(r"^ARG (\w+)", (ROOT / "images/update.Dockerfile").read_text(), re.MULTILINE)
    given = re.findall(r"--build-arg (\w+)=", builds[2])
    assert set(given) <= set(declared), "an argument that the Dockerfile does not declare is ignored"
    lock = json.loads((copy.root / "build/kind/lock.json").read_text())
    assert lock == {name: f"localhost/grpo-pipeline-{name}:kind" for name in ("cpu", "tracking", "update")}
    (load,) = copy.calls("kind")
    assert set(load.split()[4:]) == set(lock.values())


@needs_jq
def test_every_step_of_test_runs_to_its_end(copy: Copy) -> None:
    """In order, each through forward.sh; the champion is there whatever the run's name, which has the time in it."""
    stub(copy.state.parent / "bin/date", copy.state, "date $*", "echo 1764181800")
    crown(copy, "kind-run-1764181800")
    done = copy.run("test.sh")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "champion: " in done.stdout and "all passed" in done.stdout
    commands = [call.split()[0] for call in copy.calls("grpo")]
    assert commands == ["submit", "schedule", "unschedule", "submit", "cancel"]
    assert copy.calls("grpo")[-1] == "cancel r1"
    programs = [Path(call.split()[0]) for call in copy.calls("python") if not call.startswith("-")]
    assert [path.name for path in programs] == ["prepare.py", "upload.py"] and all(path.exists() for path in programs)


def forwarded(copy: Copy, step: str, **environment: str) -> subprocess.CompletedProcess[str]:
    overrides = copy.root / "build/kind/overrides"
    overrides.parent.mkdir(parents=True, exist_ok=True)
    overrides.write_text("store=s3://b/store\n")
    return copy.run("forward.sh", str(copy.root / "k8s/kind" / step), **environment)


@needs_jq
def test_a_run_without_a_champion_fails_the_test(copy: Copy) -> None:
    done = forwarded(copy, "71-run.sh")
    assert done.returncode != 0 and "has no champion" in done.stderr


@needs_jq
def test_a_run_that_mlflow_has_no_reward_of_fails_the_test(copy: Copy) -> None:
    stub(copy.state.parent / "bin/date", copy.state, "date $*", "echo 1764181800")
    crown(copy, "kind-run-1764181800")
    assert forwarded(copy, "71-run.sh").returncode == 0
    done = forwarded(copy, "71-run.sh", METRIC="loss")
    assert done.returncode == 1 and "MLflow has no run with the metric reward" in done.stderr


@needs_jq
def test_a_schedule_that_fires_twice_fails_the_test(copy: Copy) -> None:
    assert forwarded(copy, "72-recurring.sh").returncode == 0
    (copy.state / "runs").write_text(json.dumps({"runs": ONE_RUN["runs"] * 2}))
    done = forwarded(copy, "72-recurring.sh")
    assert done.returncode == 1 and "it must fire once" in done.stderr


@needs_jq
def test_what_a_cancelled_run_leaves_fails_the_test(copy: Copy) -> None:
    """The stub's `grpo cancel` stops nothing here, and the wait's clock is the real one, shortened."""
    path = copy.root / "k8s/kind/73-cancel.sh"
    path.write_text(path.read_text().replace("eventually 300 nothing_left", "eventually 1 nothing_left"))
    stub(copy.state.parent / "bin/grpo", copy.state, "grpo $*", GRPO.replace('touch "$STATE/cancelled"', "true"))
    done = forwarded(copy, "73-cancel.sh")
    assert done.returncode == 1 and "left behind: pod/update-1 trainjob/grpo-1" in done.stderr


def test_down_removes_the_cluster_and_what_was_made_for_it(copy: Copy) -> None:
    (copy.root / "build/kind").mkdir(parents=True)
    assert copy.run("down.sh").returncode == 0
    assert copy.calls("kind") == ["delete cluster --name grpo"] and not (copy.root / "build/kind").exists()
