"""The whole stage: what it writes, which policy it accepts, how it goes on after a kill, what it refuses."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from components.common.errors import DataError, DigestMismatch, HealthError, SettingsError, StageError, StoreError
from components.common.manifest import Manifest
from components.common.settings import RunContext
from components.common.store import open_store
from components.common.tokenizer import tokenizer_digest
from components.rollout.config import RolloutSettings
from components.rollout.plan import eval_is_due
from components.rollout.prompts import choose

from .conftest import stops_at_part

ROOT = Path(__file__).parents[2]


def test_one_job_samples_train_and_eval_prompts(make_job):
    job = make_job()
    manifest = job.run()
    train, evaluation = job.table(manifest, "train"), job.table(manifest, "eval")
    assert manifest.names == {"train.parquet", "eval.parquet"}
    names = [f"train-{number}" for number in range(40)]
    chosen = [names[row] for row in choose(names, seed=3, num_prompts=12, iteration=0)]
    assert train.column("prompt_id").to_pylist() == [name for name in chosen for _ in range(3)]
    assert train.column("sample_index").to_pylist() == [0, 1, 2] * 12
    assert evaluation.column("prompt_id").to_pylist() == [f"eval-{number}" for number in range(7) for _ in range(2)]
    assert train.column("answer").to_pylist() == [name.split("-")[1] for name in chosen for _ in range(3)]
    policy = json.loads(job.policy.read_text())["digest"]
    assert set(train.column("policy_digest").to_pylist()) == {policy}
    rows = train.to_pylist()
    assert all(len(row["completion_ids"]) == len(row["logprobs"]) for row in rows)
    letters = "0123456789+-=abcdefghijklmnopq"
    for row in rows:  # special tokens are left out of the text
        assert row["completion"] == "".join(letters[token - 2] for token in row["completion_ids"] if token > 1)
    assert len({row["seed"] for row in rows}) == len(rows)
    lengths = [len(row["completion_ids"]) for row in rows]
    clipped = Counter(row["finish_reason"] for row in rows)["length"] / len(rows)
    assert manifest.metrics["rollout/mean_length"] == pytest.approx(sum(lengths) / len(lengths))
    assert manifest.metrics["rollout/clipped_ratio"] == pytest.approx(clipped)
    assert manifest.metrics["rollout/num_completions"] == 36
    assert manifest.metadata["sampling"]["temperature"] == 1.0
    assert manifest.metadata["proof"] == "bytes"


def test_eval_prompts_are_sampled_when_due_and_the_last_policy_only_there(make_job):
    job = make_job(iteration=None)  # the start policy of a fine-tune need not bear a number
    kinds = [job.run(iteration=0, eval_every=3, out="0").names]
    job = make_job(name="second", iteration=1)
    kinds.append(job.run(iteration=1, eval_every=3, out="1").names)
    job = make_job(name="third", iteration=4)
    kinds.append(job.run(iteration=4, eval_every=3, out="4").names)
    assert kinds == [{"train.parquet", "eval.parquet"}, {"train.parquet"}, {"eval.parquet"}]


@pytest.mark.parametrize("staleness", [0, 1])
@pytest.mark.parametrize(("first", "iterations", "every"), [(0, 1, 1), (0, 4, 1), (3, 5, 3), (4, 6, 4), (0, 7, 100)])
def test_each_policy_that_is_due_is_evaluated_once(staleness, first, iterations, every):
    context = RunContext(
        fine_tune="f", run="r", store="s", seed=0, first_iteration=first, iterations=iterations, staleness=staleness
    )
    settings, last = RolloutSettings(eval_every=every), first + iterations
    rollouts = [(iteration, max(first, iteration - staleness)) for iteration in range(first, last)]
    rollouts += [(policy + staleness, policy) for policy in range(rollouts[-1][1] + 1, last + 1)]
    judged = [policy for iteration, policy in rollouts if eval_is_due(settings, context, iteration, policy)]
    due = {policy for policy in range(first, last + 1) if policy % every == 0} | {first, last}
    if staleness and iterations > 1:
        due.add(last - 1)  # it has a rollout of its own, which samples nothing else
    assert judged == sorted(due)


def test_shards_share_the_prompts_and_draw_what_one_job_draws(make_job):
    whole = make_job(name="whole")
    together = whole.table(whole.run(), "train").to_pylist()
    apart = []
    for shard in range(3):
        job = make_job(name=f"shard{shard}", shards=3)
        apart += job.table(job.run(shard=shard), "train").to_pylist()
    by_key = {(row["prompt_id"], row["sample_index"]): row for row in apart}
    assert len(apart) == len(by_key) == len(together)
    for row in together:
        other = by_key[row["prompt_id"], row["sample_index"]]
        assert other["completion_ids"] == row["completion_ids"]
        assert other["logprobs"] == pytest.approx(row["logprobs"], abs=1e-5)


LONG = {"num_prompts": 120, "group_size": 2, "max_completion_length": 60, "batch_size": 8, "save_every_seconds": 0}


def spawn(job, how=("-m", "components.rollout"), **changes) -> subprocess.Popen:
    """Starts the stage as a process of its own."""
    command = [sys.executable, *how]
    for name, value in job.arguments(**changes).items():
        command += ["--" + name, str(value)]
    return subprocess.Popen(
        command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def saved_parts(job) -> list[str]:
    """Keys of saved groups in a job's store."""
    return [stat.key for stat in open_store(job.context.store).list("partial/")]


def wait_for_parts(job, child: subprocess.Popen, count: int) -> None:
    deadline = time.monotonic() + 240
    while len(saved_parts(job)) < count:
        assert child.poll() is None, child.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.fixture
def one_thread():
    """Sums in the order a process with OMP_NUM_THREADS=1 has."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_a_killed_rollout_goes_on_and_ends_bit_for_bit_as_if_never_killed(make_job, one_thread):
    undisturbed = make_job(name="undisturbed", num_train=120).run(**LONG)
    job = make_job(name="killed", num_train=120)
    child = spawn(job, ("-c", stops_at_part(20)), **LONG)
    wait_for_parts(job, child, 3)
    child.kill()
    child.communicate()
    finished_then = len(saved_parts(job))
    assert 3 <= finished_then <= 20  # of 32
    assert not (job.folder / "completions.json").exists()
    resumed = job.run(**LONG)
    assert resumed.digest == undisturbed.digest
    assert saved_parts(job) == []


def test_sigterm_saves_what_is_finished_and_says_so(make_job, one_thread):
    job = make_job(num_train=120)
    settings = LONG | {"save_every_seconds": 3600}  # nothing would be saved by the clock
    child = spawn(job, **settings, progress_every_seconds=0.001)
    for line in child.stdout:
        if "seconds_left" in line:  # a batch is done; before that only its tokens are told
            break
    child.send_signal(signal.SIGTERM)
    _, errors = child.communicate(timeout=240)
    assert child.returncode == 2
    assert "told to end (SIGTERM): finished groups are saved" in errors
    assert len(saved_parts(job)) == 1
    undisturbed = make_job(name="undisturbed", num_train=120).run(**settings)
    assert job.run(**settings, progress_every_seconds=0.001).digest == undisturbed.digest


def test_sigterm_does_not_wait_for_the_engine(make_job):
    """One batch holds the whole job and takes minutes; the process must end long before."""
    job = make_job(num_train=120)
    child = spawn(
        job, progress_every_seconds=1e-6,
        **LONG | {"batch_size": 4096, "max_completion_length": 110, "group_size": 400, "stop_token_ids": []},
    )  # fmt: skip
    for line in child.stdout:
        if ": 0 of 48014 " in line:  # a token of each is drawn, and the next is under way
            break
    child.send_signal(signal.SIGTERM)
    _, errors = child.communicate(timeout=240)
    assert child.returncode == 2
    assert "told to end (SIGTERM)" in errors
    assert saved_parts(job) == []


def test_cut_and_foreign_parts_are_dropped_and_drawn_again(make_job, one_thread, monkeypatch):
    undisturbed = make_job(name="undisturbed", num_train=120).run(**LONG)
    job = make_job(name="stopped", num_train=120)

    def stop(self, done, total, **figures):
        if done > 60:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("components.common.stage.Stage.progress", stop)
        job.run(**LONG, progress_every_seconds=1e-6)
    store = open_store(job.context.store)
    first, second, *others = saved_parts(job)
    assert others
    store.put_bytes(store.get_bytes(first)[:-40], first)
    store.put_bytes(b"PAR1", second)
    assert job.run(**LONG, progress_every_seconds=1e-6).digest == undisturbed.digest


def test_a_store_that_refuses_a_part_does_not_end_the_rollout(make_job, one_thread, monkeypatch):
    """Two saves fail, then the rollout is stopped: what they could not save is in the next part."""
    from components.rollout.resume import Saved

    save, refusals = Saved.save, []

    def refuse_twice(self, groups):
        if len(set(refusals)) < 2:
            refusals.append(len(groups))
            raise StoreError("no room")
        save(self, groups)

    def stop(self, done, total, **figures):
        if done > 40:
            raise KeyboardInterrupt

    job = make_job(num_train=120)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("components.common.stage.Stage.progress", stop)
        patch.setattr(Saved, "save", refuse_twice)
        job.run(**LONG, progress_every_seconds=1e-6)
    assert sorted(set(refusals)) == [4, 8]
    drawn = []
    monkeypatch.setattr(
        "components.common.stage.Stage.progress", lambda self, done, total, **figures: drawn.append(total)
    )
    job.run(**LONG, progress_every_seconds=1e-6)
    assert drawn[0] == 120 * 2 + 7 * 2 - 48  # six batches of eight were drawn before it stopped


def test_nothing_is_published_when_what_was_resumed_has_failed(make_job, monkeypatch):
    from components.rollout.resume import Sample, Saved

    def all_failed(self, groups):
        return {group.key: [Sample([], [], "error", "gone") for _ in group.requests] for group in groups}

    monkeypatch.setattr(Saved, "load", all_failed)
    with pytest.raises(HealthError, match="50 of 50 samples could not be drawn; the first: gone"):
        make_job().run()


def test_parts_nobody_came_back_for_are_collected(make_job, monkeypatch):
    from datetime import timedelta

    from components.common import gc

    job = make_job()

    def stop(self, done, total, **figures):
        if done:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("components.common.stage.Stage.progress", stop)
        job.run(**LONG | {"num_prompts": 30}, progress_every_seconds=1e-6)
    assert saved_parts(job)
    store = open_store(job.context.store)
    found = gc.plan(store, keep_last=1)
    gc.sweep(store, found)
    assert saved_parts(job), "they are young: someone may come back"
    young = timedelta(seconds=-60)
    gc.sweep(store, gc.plan(store, keep_last=1, grace=young), grace=young)
    assert saved_parts(job) == []
    job.run()  # what a policy and prompts need was left alone


def test_a_swapped_weight_file_is_caught(make_job, policy_dir, monkeypatch, tmp_path):
    """The fetch is right and the file is exchanged behind its back, as a node's shared cache could do."""
    from components.common.stage import Stage

    from .conftest import make_policy

    other = make_policy(tmp_path / "other", seed=1)
    fetch = Stage.fetch

    def fetch_then_swap(self, role, names=None):
        folder = fetch(self, role, names)
        if role == "policy":
            (folder / "model.safetensors").write_bytes((other / "model.safetensors").read_bytes())
        return folder

    monkeypatch.setattr(Stage, "fetch", fetch_then_swap)
    with pytest.raises(DigestMismatch, match=r"the engine loaded another model\.safetensors than the policy's"):
        make_job().run()


@pytest.mark.parametrize(("iteration", "staleness", "accepted"), [
    (2, 0, True), (1, 0, False), (3, 0, False), (1, 1, True), (2, 1, True), (0, 1, False),
])  # fmt: skip
def test_a_policy_of_another_iteration_is_refused(make_job, iteration, staleness, accepted):
    job = make_job(iteration=iteration, staleness=staleness)
    if accepted:
        assert job.run(iteration=2).metrics["rollout/staleness"] == 2 - iteration
    else:
        with pytest.raises(StageError, match=f"iteration 2 was given the policy of iteration {iteration}"):
            job.run(iteration=2)


def test_nan_logits_stop_the_iteration(make_job, policy_dir, tmp_path):
    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    broken.mkdir()
    for path in policy_dir.iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    weights = load_file(broken / "model.safetensors")
    weights["model.embed_tokens.weight"][:] = float("nan")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(HealthError, match=r"50 of 50 samples could not be drawn; the first: .*logits are NaN"):
        make_job(broken).run()


def test_failed_samples_within_the_limit_are_recorded_not_dropped(make_job, policy_dir, tmp_path):
    """A NaN row in the embedding breaks exactly the samples whose prompt holds that token."""
    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    broken.mkdir()
    for path in policy_dir.iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    config = json.loads((broken / "config.json").read_text()) | {"tie_word_embeddings": False}
    (broken / "config.json").write_text(json.dumps(config))
    weights = load_file(broken / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    weights["model.embed_tokens.weight"][20] = float("nan")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    job = make_job(broken)
    manifest = job.run(max_failed_share=1.0)
    rows = job.table(manifest, "train").to_pylist()
    assert len(rows) == 36
    held = [20 in row["prompt_ids"] for row in rows]
    assert any(held)
    for row, holds in zip(rows, held, strict=True):
        if holds:
            assert row["finish_reason"] == "error"
        if row["finish_reason"] == "error":
            assert (row["completion_ids"], row["logprobs"], row["completion"]) == ([], [], "")
    failed = sum(row["finish_reason"] == "error" for row in rows)
    assert 0 < failed < 36
    assert manifest.metrics["rollout/num_failed"] == failed


def test_prompts_over_the_context_are_refused_before_an_engine_starts(make_job):
    with pytest.raises(DataError, match=r"the model's context is 128: set dataset.max_prompt_length to 4 or less"):
        make_job().run(max_completion_length=124)


def test_prompts_of_another_tokenizer_are_refused(make_job, policy_dir, tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    for path in policy_dir.iterdir():
        (small / path.name).write_bytes(path.read_bytes())
    config = json.loads((small / "config.json").read_text()) | {"vocab_size": 20}
    (small / "config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match="the policy's vocabulary has 20: the prompts were made with another tokenizer"):
        make_job(small).run()


def test_prompts_of_another_tokenizer_of_the_same_size_are_refused(make_job):
    """Ids in range tell nothing: the dataset stage's digest does."""
    job = make_job()
    policy, prompts = Manifest.load(job.policy), Manifest.load(job.prompts)
    own = tokenizer_digest(policy)
    job.prompts.write_bytes(prompts.model_copy(update={"metadata": {"tokenizer_digest": own}}).dump())
    job.run()
    other = [
        file.model_copy(update={"digest": "blake3:" + "0" * 64}) if file.name == "tokenizer.json" else file
        for file in policy.files
    ]
    foreign = tokenizer_digest(policy.model_copy(update={"files": tuple(other)}))
    job = make_job(name="foreign")
    job.prompts.write_bytes(prompts.model_copy(update={"metadata": {"tokenizer_digest": foreign}}).dump())
    with pytest.raises(DataError, match="made with another tokenizer or chat template than this policy's"):
        job.run()


def test_progress_is_told_while_the_first_batch_is_drawn(make_job, monkeypatch):
    told = []
    monkeypatch.setattr(
        "components.common.stage.Stage.progress", lambda self, done, total, **figures: told.append((done, figures))
    )
    make_job().run(progress_every_seconds=1e-6)
    early = [figures for done, figures in told if done == 0]
    assert len(early) >= 9  # one a token of the batch of train samples
    assert all(figures["tokens_per_second"] > 0 and figures["running"] for figures in early[1:])
    assert all("seconds_left" not in figures for figures in early)
    assert all(figures["seconds_left"] >= 0 for done, figures in told if done)


def test_stop_tokens_are_the_configuration_s_and_the_tokenizer_s(policy_dir, tmp_path):
    from components.rollout.sampler import stop_tokens

    for name in ("tokenizer.json", "config.json"):
        (tmp_path / name).write_bytes((policy_dir / name).read_bytes())
    assert stop_tokens(tmp_path) == (1,)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "9"}}')
    assert stop_tokens(tmp_path) == (1, 11)  # the letters follow two special tokens
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [5, 11]}')
    assert stop_tokens(tmp_path) == (5, 11)


def test_a_policy_without_any_end_token_warns(make_job, policy_dir, tmp_path, monkeypatch):
    endless = tmp_path / "endless"
    endless.mkdir()
    for path in policy_dir.iterdir():
        if path.name != "generation_config.json":
            (endless / path.name).write_bytes(path.read_bytes())
    config = json.loads((endless / "config.json").read_text()) | {"eos_token_id": None}
    (endless / "config.json").write_text(json.dumps(config))
    lines = []
    monkeypatch.setattr("components.rollout.stage.log.warning", lambda text, *values: lines.append(text))
    make_job(endless).run(stop_token_ids=[1])
    assert not any("names an end token" in line for line in lines)
    make_job(endless, name="second").run()
    assert [line for line in lines if "set rollout.stop_token_ids or rollout.stop" in line]


def test_every_completion_cut_warns_with_the_setting_to_raise(make_job, monkeypatch):
    lines = []
    monkeypatch.setattr("components.rollout.report.log.warning", lambda text, *values: lines.append(text % values))
    make_job().run(max_completion_length=1, stop_token_ids=[])
    assert [line for line in lines if "raise rollout.max_completion_length" in line]


def test_vllm_where_it_is_not_installed_is_refused_with_the_way_out(make_job):
    with pytest.raises(SettingsError, match=r"name an interpreter that has it in rollout\.python"):
        make_job().run(engine="vllm")


def test_an_interpreter_that_is_not_there_is_refused(make_job):
    with pytest.raises(SettingsError, match=r"rollout\.python = '/no/python' is not an interpreter"):
        make_job().run(python="/no/python")


def test_the_same_job_is_not_run_twice(make_job):
    job = make_job()
    first = job.run()
    assert job.run(out="again") == first
