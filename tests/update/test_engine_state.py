"""Optimizer state through the store: resumed training is uninterrupted training, on any number of processes."""

import multiprocessing
import os

import numpy as np
import pytest
import torch

from components.common.manifest import Manifest
from components.update.batching import Batch
from components.update.job import Job


def uninterrupted(folders, results):
    """Two iterations by one worker that never stops; leaves its weights in `results`."""
    from components.update import policy
    from components.update.train import Trainer

    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    jobs = [Job.model_validate_json((folder / "job.json").read_text()) for folder in folders]
    trainer = Trainer(folders[0], jobs[0])
    engine = trainer._engine()
    for folder, job in zip(folders, jobs, strict=True):
        trainer.job, trainer.batch = job, Batch.load(folder / "batch.npz")
        trainer.columns.behaviour = trainer.batch.behaviour_logprobs
        for number, step in enumerate(trainer._plan()):
            trainer._step(engine, step, number)
    policy.save(engine, results, dtype=jobs[0].publish_dtype)


@pytest.mark.parametrize(
    ("dtype", "settings"),
    [("float32", {"zero_stage": 0}), ("bfloat16", {"zero_stage": 1, "dtype": "bfloat16"}),
     ("bfloat16", {"zero_stage": 0, "dtype": "float32"})],
    ids=["float32", "bfloat16 with masters", "float32 published as bfloat16"],
)  # fmt: skip
def test_resumed_equals_uninterrupted_bit_for_bit(case, tmp_path, monkeypatch, dtype, settings):
    from engine_case import save_tiny_model

    from components.update import launch as launching

    model = save_tiny_model(tmp_path / "model", dtype=dtype)
    kept, plain_launch = [], launching.launch

    def keeping(folder, job):
        result = plain_launch(folder, job)
        copy = tmp_path / f"job-{len(kept)}"
        os.system(f"cp -r {folder} {copy}")
        kept.append(copy)
        return result

    monkeypatch.setattr(launching, "launch", keeping)
    inputs = case.start(model)
    settings |= {"warmup_steps": 5, "learning_rate": 1e-3, "adam_epsilon": 1e-8}
    for iteration in range(2):  # the second batch does not depend on the first update, so that both ways see the same
        scored = case.scored(f"scored-{iteration}", model, inputs["policy"], seed=iteration)
        outcome = case.update(inputs, scored, iteration=iteration, **settings)
        inputs = outcome.inputs
    assert outcome.metrics["learning_rate"] == pytest.approx(2e-4 * 2)
    process = multiprocessing.get_context("fork").Process(target=uninterrupted, args=(kept, tmp_path / "result"))
    process.start()
    process.join()
    assert process.exitcode == 0
    from safetensors.torch import load_file

    wanted, found = load_file(tmp_path / "result" / "model.safetensors"), outcome.weights()
    assert set(wanted) == set(found)
    for name, weight in wanted.items():
        assert torch.equal(weight.view(torch.uint8), found[name].view(torch.uint8)), name


def test_state_moves_to_another_number_of_processes_and_stage(case, engine_model):
    settings = {"learning_rate": 1e-2, "adam_epsilon": 1e-2}
    finals = {}
    ways = {
        "alone": [{"zero_stage": 0}, {"zero_stage": 0}],
        "2 to 1": [{"zero_stage": 1, "num_processes": 2}, {"zero_stage": 2}],
        "3 to 2": [{"zero_stage": 3, "num_processes": 3}, {"zero_stage": 0, "num_processes": 2}],
        "1 to 2": [{"zero_stage": 2}, {"zero_stage": 3, "num_processes": 2}],
    }
    start = case.start(engine_model)
    scored = [case.scored(f"scored-{seed}", engine_model, start["policy"], seed=seed) for seed in range(2)]
    for name, stages in ways.items():
        inputs = start
        for iteration, stage in enumerate(stages):
            case.run_name, case.staleness = name.replace(" ", "-"), 1
            outcome = case.update(inputs, scored[iteration], iteration=iteration, **settings, **stage)
            inputs = outcome.inputs
        finals[name] = outcome
    files = [path for path in finals["3 to 2"].optimizer.names if path.endswith(".safetensors")]
    assert sorted(files) == ["optimizer-00000-of-00002.safetensors", "optimizer-00001-of-00002.safetensors"]
    wanted_state, wanted = finals["alone"].state(), finals["alone"].weights()
    for name in ("2 to 1", "3 to 2", "1 to 2"):
        for key, value in finals[name].state().items():
            torch.testing.assert_close(value, wanted_state[key], rtol=1e-3, atol=1e-7)
        for key, value in finals[name].weights().items():
            torch.testing.assert_close(value, wanted[key], rtol=0, atol=1e-6)


def test_moments_start_anew_when_they_are_not_carried(case, engine_model):
    inputs = case.start(engine_model)
    scored = case.scored("scored", engine_model, inputs["policy"])
    first = case.update(inputs, scored, carry_optimizer=False)
    assert first.optimizer.files == ()
    assert first.optimizer.metadata["global_step"] == 1
    case.staleness = 1
    second = case.update(first.inputs, scored, iteration=1, carry_optimizer=False, warmup_steps=4)
    assert second.metrics["learning_rate"] == pytest.approx(1e-2 * 2 / 4)  # the step count goes on all the same
    assert second.optimizer.metadata["global_step"] == 2


def test_state_is_published_every_second_iteration_and_the_last(case, engine_model):
    case.iterations, case.staleness = 3, 1
    inputs = case.start(engine_model)
    scored = case.scored("scored", engine_model, inputs["policy"])
    sizes = []
    for iteration in range(3):
        digest = Manifest.load(inputs["policy"]).digest
        scored = case.scored(f"s{iteration}", engine_model, inputs["policy"])
        outcome = case.update(  # all log-probabilities are the start policy's
            inputs, scored, iteration=iteration, optimizer_every=2, health={"max_logp_difference": None}
        )
        inputs = outcome.inputs
        state = outcome.optimizer
        sizes.append((bool(state.files), state.metadata.get("policy_digest") == outcome.policy.digest))
        assert outcome.policy.digest != digest
    assert sizes == [(False, False), (True, True), (True, True)]


def test_state_of_another_model_is_refused(case, engine_model, tmp_path):
    from engine_case import save_tiny_model

    from components.common.errors import DataError

    inputs = case.start(engine_model)
    scored = case.scored("scored", engine_model, inputs["policy"])
    first = case.update(inputs, scored)
    other = save_tiny_model(tmp_path / "other", intermediate_size=64)
    case.run_name = "other"
    strange = case.start(other)
    scored = case.scored("scored-2", other, strange["policy"])
    with pytest.raises(DataError, match="belongs to another model: set carry_optimizer = false"):
        case.update(strange | {"optimizer": first.optimizer_path}, scored)


def test_a_batch_survives_its_file(tmp_path):
    batch = Batch(
        prompt_ids=np.array([1, 2, 3], np.int32), prompt_offsets=np.array([0, 1, 3]),
        completion_ids=np.array([4, 5, 6], np.int32), completion_offsets=np.array([0, 2, 3]),
        behaviour_logprobs=np.array([-1.0, -2.0, -3.0], np.float32), group=np.array([0, 0]),
        truncated=np.array([False, True]), rewards=np.array([[1.0], [np.nan]]), advantages=np.array([0.5, -0.5]),
        scored_lengths=np.array([2, 0]), keep=np.array([True, False]),
    )  # fmt: skip
    batch.save(tmp_path / "batch.npz")
    loaded = Batch.load(tmp_path / "batch.npz")
    assert loaded.model_lengths.tolist() == [2, 2]  # one prompt token and two of the completion, less the last
    assert np.isnan(loaded.rewards[1, 0])
    assert loaded.completion_ids.dtype == np.int32


def test_a_killed_attempt_leaves_no_state_of_another_policy(case, engine_model, monkeypatch):
    """Killed between its two manifests; the second attempt comes to other weights, as kernels of a GPU may."""
    from components.common.stage import Stage

    inputs, publish = case.start(engine_model), Stage.publish
    scored = case.scored("scored", engine_model, inputs["policy"])

    def killed(stage, role, **arguments):
        if role == "next_policy":
            raise KeyboardInterrupt
        return publish(stage, role, **arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Stage, "publish", killed)
        case.update(inputs, scored)

    from components.update import launch as launching

    plain_launch = launching.launch

    def other(folder, job):
        changed = job.settings.model_copy(update={"learning_rate": 2 * job.settings.learning_rate})
        return plain_launch(folder, job.model_copy(update={"settings": changed}))

    monkeypatch.setattr(launching, "launch", other)
    outcome = case.update(inputs, scored)
    assert outcome.optimizer.metadata["policy_digest"] == outcome.policy.digest
