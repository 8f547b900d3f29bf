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
from components.common.store import open_store

from .conftest import stops_at_part

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


def test_an_error_of_several_lines_is_told_whole(make_job, tmp_path):
    failing = tmp_path / "failing"
    failing.write_text(
        '#!/bin/sh\nprintf "a log line\\npython -m components.rollout: two things:\\n  one\\n  two\\n"\nexit 2\n'
    )
    failing.chmod(0o755)
    with pytest.raises(StageError, match=r"ended with status 2: two things:\n  one\n  two$"):
        make_job().run(python=str(failing))


def test_a_limit_of_vllm_below_prompt_and_completion_is_refused_before_it_starts(make_job, vllm_python):
    """Prompts have up to 8 tokens and completions 10; vLLM itself would cut completions without a word."""
    with pytest.raises(StageError, match=r"rollout\.vllm\.max_model_len is 17: set it to 18 or more"):
        make_job().run(engine="vllm", python=vllm_python, vllm={"max_model_len": 17})


def test_a_killed_vllm_rollout_goes_on_with_the_same_samples(make_job, vllm_python):
    changes = {
        "engine": "vllm", "python": vllm_python, "num_prompts": 120, "group_size": 2, "max_completion_length": 60,
        "save_every_seconds": 0, "vllm": {"max_num_seqs": 8},
    }  # fmt: skip
    undisturbed = make_job(name="undisturbed", num_train=120)
    whole = undisturbed.table(undisturbed.run(**changes), "train").to_pylist()
    job = make_job(name="killed", num_train=120)
    command = [vllm_python, "-c", stops_at_part(20)]
    for name, value in job.arguments(**changes).items():
        command += ["--" + name, str(value)]
    child = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})
    store = open_store(job.context.store)
    while sum(1 for _ in store.list("partial/")) < 3:
        assert child.poll() is None
        time.sleep(0.005)
    child.kill()
    child.wait()
    assert not (job.folder / "completions.json").exists()
    rows = job.table(job.run(**changes), "train").to_pylist()
    keys = [(row["prompt_id"], row["sample_index"], row["seed"]) for row in rows]
    assert keys == [(row["prompt_id"], row["sample_index"], row["seed"]) for row in whole]
    same = [one["completion_ids"] == other["completion_ids"] for one, other in zip(rows, whole, strict=True)]
    assert sum(same) >= 0.97 * len(same)  # a batch of another make-up may round a token's odds to the other side


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
            if Path(f"/proc/{child}/stat").read_text().split()[2] == "Z":
                return
        except (FileNotFoundError, ProcessLookupError):
            return
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    pytest.fail("the child outlived its parent")
