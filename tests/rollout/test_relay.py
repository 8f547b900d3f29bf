"""The stage in the environment that has vLLM, started from one that has not."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from components.common.errors import StageError

ROOT = Path(__file__).parents[2]


def test_the_stage_runs_with_vllm_in_its_own_environment(make_job, vllm_python, bf16_dir, capfd):
    job = make_job(bf16_dir)
    manifest = job.run(engine="auto", python=vllm_python)
    assert manifest.metadata["engine"] == "vllm"
    assert manifest.metadata["proof"] == "bytes"
    assert manifest.digest == json.loads((job.folder / "completions.json").read_text())["digest"]
    rows = job.table(manifest, "train").to_pylist()
    assert len(rows) == 36
    assert all(len(row["completion_ids"]) == len(row["logprobs"]) > 0 for row in rows)
    assert {row["policy_digest"] for row in rows} == {json.loads(job.policy.read_text())["digest"]}
    assert manifest.metrics["rollout/engine_start_seconds"] > 0
    assert ": vllm started in" in capfd.readouterr().out


def test_an_error_over_there_is_told_here(make_job, tmp_path):
    job = make_job()
    failing = tmp_path / "failing"
    failing.write_text(
        '#!/bin/sh\necho a line of its log\necho "python -m components.rollout: no GPU: add one" >&2\nexit 2\n'
    )
    failing.chmod(0o755)
    with pytest.raises(StageError, match=r"ended with status 2: no GPU: add one$"):
        job.run(python=str(failing))


def test_the_child_ends_with_its_parent(make_job, tmp_path):
    waiting = tmp_path / "waiting"
    waiting.write_text(f"#!/bin/sh\necho $$ > {tmp_path}/pid\nexec sleep 100\n")
    waiting.chmod(0o755)
    command = [sys.executable, "-m", "components.rollout"]
    for name, value in make_job().arguments(python=str(waiting)).items():
        command += ["--" + name, str(value)]
    parent = subprocess.Popen(command, cwd=ROOT)
    deadline = time.monotonic() + 120
    while not (pid_file := tmp_path / "pid").exists() or not pid_file.read_text().strip():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    child = int(pid_file.read_text())
    parent.kill()  # SIGKILL: the parent cannot pass anything on
    parent.wait()
    while time.monotonic() < deadline:
        try:
            os.kill(child, 0)
        except ProcessLookupError:
            return
        if Path(f"/proc/{child}/stat").read_text().split()[2] == "Z":
            return
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    pytest.fail("the child outlived its parent")
