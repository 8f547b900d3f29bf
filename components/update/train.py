"""The worker: one process of the update, started by `launch.py` on every device.

S completions      N completion tokens of a micro-batch      W ranks
"""

import gc
import math
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from components.common.errors import HealthError
from components.update import checkpoint, lora, policy
from components.update.batching import Batch, Step, cut, deal, plan_steps
from components.update.engine import Engine, deepspeed_config, for_reading, import_deepspeed
from components.update.health import check_figures
from components.update.job import Job, Result
from components.update.kl import kl_estimate, penalised_rewards
from components.update.losses import BatchTotals, sequence_weights
from components.update.metrics import Meter, speed_figures
from components.update.model import MicroBatch, ScoringModel, check_packing, collate, load_policy, scoring, trainable
from components.update.objective import Columns, Objective, Tokens
from components.update.weighting import add_advantages


class Trainer:
    """One iteration's optimizer steps on one rank."""

    def __init__(self, folder: Path, job: Job) -> None:
        self.folder, self.job, self.settings = folder, job, job.settings
        self.rank, self.world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        on_gpu = job.device == "cuda"
        self.device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
        self.dtype = getattr(torch, job.dtype)
        self.padded = self.settings.layout == "padded"
        self.is_ppo = self.settings.algorithm == "ppo"
        self.meter = Meter(self.device)
        self.batch = Batch.load(folder / "batch.npz")
        self.columns = Columns(self.batch.behaviour_logprobs)
        self.adapter: Any = None
        self.figures: dict[str, float] = {}
        self.num_skipped = 0
        self.num_skipped_in_a_row = job.num_skipped

    def run(self) -> Result:
        """Trains, checks the figures' health, writes `next/`."""
        started = time.monotonic()
        if self.settings.beta > 0 and not self.job.adapter_off_is_reference:
            self.columns.reference = self._reference_logprobs()
        engine = self._engine()
        if not self.padded:
            check_packing(engine.engine, self.batch, self.device)
        self._score_before(engine)
        steps = self._plan()
        ready = time.monotonic()
        for number, step in enumerate(steps):
            self._step(engine, step, number)
        figures = self.meter.read() | self.figures
        figures |= speed_figures(self, engine, steps, training=time.monotonic() - ready, setup=ready - started)
        figures["skipped_steps"] = float(self.num_skipped)
        check_figures(self.settings, figures)
        self._save(engine)
        global_step = self.job.global_step + len(steps) - self.num_skipped
        known = {name: value for name, value in figures.items() if math.isfinite(value)}
        return Result(metrics=known, global_step=global_step, num_skipped=self.num_skipped_in_a_row)

    def _plan(self) -> list[Step]:
        return plan_steps(
            self.batch, num_epochs=self.settings.num_epochs, num_minibatches=self.settings.num_minibatches,
            num_ranks=self.world_size, max_tokens=self.settings.max_tokens_per_microbatch, seed=self.job.seed,
            padded=self.padded,
        )  # fmt: skip

    def _load(self, name: str) -> torch.nn.Module:
        zero3 = None
        if self.settings.zero_stage == 3:
            import_deepspeed()
            zero3 = deepspeed_config(self.settings, self.job.dtype)
        checkpointing = self.settings.gradient_checkpointing and name == "policy"
        return load_policy(
            self.folder / name, dtype=self.dtype, padded=self.padded, checkpointing=checkpointing, zero3=zero3
        )

    def _engine(self) -> Engine:
        """The policy with whatever trains, its optimizer state restored."""
        model, restore, state = self._model(), self.job.restore, self.folder / "optimizer"
        in_float32 = self.dtype == torch.float32
        names = trainable(model)
        critic = [parameter for parameter, name in names.items() if name.startswith(checkpoint.CRITIC)]
        known = names  # after an iteration of another algorithm the critic starts anew
        if not checkpoint.has_critic(state):
            known = {parameter: name for parameter, name in names.items() if not name.startswith(checkpoint.CRITIC)}
        if restore != "nothing":  # weights known more exactly than the policy's files tell, and the critic's
            before = {p: name for p, name in known.items() if self._has_master(name) and (in_float32 or self.is_ppo)}
            checkpoint.load_masters(state, before, divided=self.settings.zero_stage == 3)
        engine = Engine(model, self.settings, dtype=self.job.dtype, device=self.device, critic=critic)
        if restore != "nothing":
            pieces = checkpoint.fragments(engine.engine, known, rank=self.rank)
            checkpoint.restore(state, pieces, engine.optimizer, lambda name: not in_float32 and self._has_master(name))
        return engine

    def _has_master(self, name: str) -> bool:
        """Whether a parameter's float32 weights are taken from the optimizer state rather than the policy."""
        if name.startswith(checkpoint.CRITIC):
            return True
        return self.job.restore == "all" and self.job.publish_dtype != "float32"

    def _model(self) -> ScoringModel:
        loaded = self._load("policy")
        if self.job.adapter != "none":
            folder = self.folder / lora.FOLDER if self.job.adapter == "carried" else None
            self.adapter = lora.attach(loaded, self.settings.lora, folder)
        if not self.is_ppo:
            return ScoringModel(loaded)
        from components.update.critic import ActorCritic, Critic

        return ActorCritic(loaded, Critic(self._load("policy")))

    def _reference_logprobs(self) -> np.ndarray:
        """The reference model's log-probabilities, its adapter on; the model is gone afterwards."""
        reference, adapter = self._load("reference"), self.folder / "reference" / lora.FOLDER
        if adapter.is_dir():
            lora.switch_on(reference, adapter)
        model = for_reading(ScoringModel(reference), self.settings, dtype=self.job.dtype, device=self.device)
        found = self._scores(model)[0]
        del model, reference
        gc.collect()  # hooks hold what they are hung on
        return found

    def _score_before(self, engine: Engine) -> None:
        """Whatever is to be known of the batch before the first step, without gradients."""
        columns, settings, engine_model = self.columns, self.settings, engine.engine
        if settings.beta > 0 and self.job.adapter_off_is_reference:
            with self.adapter.disable_adapter():
                columns.reference = self._scores(engine_model)[0]
        kl_in_reward = settings.beta > 0 and settings.kl_in == "reward"
        if self.is_ppo or kl_in_reward or settings.num_epochs * settings.num_minibatches > 1:
            columns.old, columns.values = self._scores(engine_model)
        if self.is_ppo:
            from components.update import critic

            self.columns, self.figures = critic.add_advantages(columns, self.batch, settings)
        elif kl_in_reward:
            rewards_S = self._penalised_rewards()
            shaped = replace(self.batch, rewards=rewards_S[:, None])
            self.batch, self.figures = add_advantages(shaped, settings)

    def _penalised_rewards(self) -> np.ndarray:
        """Each completion's reward minus beta times its KL to the reference, float64 (S,)."""
        old_N, reference_N = (torch.from_numpy(column) for column in (self.columns.old, self.columns.reference))
        kl_N = kl_estimate(self.settings.kl_estimator, old_N, reference_N)
        sequence_N = torch.from_numpy(np.repeat(np.arange(len(self.batch.group)), self.batch.completion_lengths))
        rewards_S = torch.from_numpy(self.batch.rewards[:, 0])
        return penalised_rewards(rewards_S, kl_N, sequence_N, self.settings.beta).numpy()

    def _to_score(self) -> Batch:
        """What trains; and where a penalty is part of the reward, truncated completions that are masked from the loss:
        their reward counts in their group's mean.
        """
        if self.is_ppo or self.settings.beta == 0 or self.settings.kl_in != "reward":
            return self.batch
        lengths_S, rewarded_S = self.batch.completion_lengths, ~np.isnan(self.batch.rewards[:, 0])
        return replace(self.batch, scored_lengths=lengths_S, keep=rewarded_S & (lengths_S > 0))

    def _scores(self, model: torch.nn.Module) -> tuple[np.ndarray, np.ndarray | None]:
        """Log-probabilities, and a critic's values, of the tokens; shared over the ranks, 0 where nothing is scored."""
        batch = self._to_score()
        lengths, sequences = batch.model_lengths, np.flatnonzero(batch.keep)
        parts = cut(
            sequences, lengths[sequences], self.settings.max_tokens_per_microbatch, multiple=self.world_size,
            padded=self.padded,
        )  # fmt: skip
        found = torch.zeros(2, len(self.columns.behaviour))
        with scoring(model) as score:
            for part in deal(parts, lengths, self.world_size)[self.rank]:
                micro = self._collate(part, batch)
                _, logprobs_N, _, *values_N = score(micro, self.job.temperature)
                found[0, micro.flat_N] = logprobs_N.float().cpu()
                if values_N:
                    found[1, micro.flat_N] = values_N[0].cpu()
        shared = found.to(self.device)
        torch.distributed.all_reduce(shared)
        logprobs, values = shared.cpu().numpy()
        return logprobs, values if self.is_ppo else None

    def _collate(self, sequences: np.ndarray, batch: Batch) -> MicroBatch:
        return collate(batch, sequences, padded=self.padded, device=self.device)

    def _step(self, engine: Engine, step: Step, number: int) -> None:
        """One optimizer step, skipped when its gradient is not finite."""
        lengths_S = self.batch.scored_lengths
        totals = BatchTotals.of(lengths_S[step.members], self.job.max_completion_length)
        weights_S = np.zeros(len(lengths_S))
        weights_S[step.members] = sequence_weights(self.settings.loss_type, lengths_S[step.members], totals)
        rate = engine.set_learning_rate(self.job.global_step + number - self.num_skipped)
        micro_batches, loss_sum = step.ranks[self.rank], torch.zeros((), device=self.device)
        meter = Meter(self.device)  # of a step that is skipped, no figure counts
        for position, sequences in enumerate(micro_batches):
            loss = self._loss(engine, self._collate(sequences, self.batch), weights_S, totals, meter)
            loss_sum += loss.detach() / self.world_size
            engine.backward(loss, last=position == len(micro_batches) - 1)
        norm, applied = engine.step()
        self.meter.add("learning_rate", rate, 1)
        if applied:
            self.meter.take(meter)
            self.meter.add("loss", loss_sum, 1 / self.world_size)
            self.meter.add("grad_norm", norm, 1)
            self.num_skipped_in_a_row = 0
        else:
            self._skip()

    def _loss(
        self, engine: Engine, micro: MicroBatch, weights_S: np.ndarray, totals: BatchTotals, meter: Meter
    ) -> Tensor:
        """A micro-batch's share of the batch's loss, times the ranks, since DeepSpeed averages over them."""
        objective = Objective(self.settings, has_old=self.columns.old is not None)
        tokens = Tokens.of(self.batch, self.columns, micro, weights_S)
        token_loss = objective.token_loss(micro, tokens, totals, scale=self.world_size)
        if objective.each_token_alone:
            loss, logprobs_N, entropy_N, *values_N = engine.engine(micro, self.job.temperature, token_loss)
        else:
            _, logprobs_N, entropy_N, *values_N = engine.engine(micro, self.job.temperature)
            loss = token_loss(logprobs_N, entropy_N, slice(None))
        objective.measure(meter, micro, tokens, logprobs_N.detach(), entropy_N.detach())
        if values_N:
            from components.update.critic import critic_loss

            share = critic_loss(values_N[0], tokens, self.settings, totals.num_tokens, meter)
            loss = loss + self.world_size * share
        return loss

    def _skip(self) -> None:
        self.num_skipped += 1
        self.num_skipped_in_a_row += 1
        limit = self.settings.health.max_skipped_steps
        if self.num_skipped_in_a_row > limit:
            raise HealthError(
                f"the gradient was not finite in {self.num_skipped_in_a_row} optimizer steps in a row "
                f"(health.max_skipped_steps = {limit}); lower learning_rate, or look for NaN in the policy's weights"
            )

    def _save(self, engine: Engine) -> None:
        target, dtype = self.folder / "next", self.job.publish_dtype
        if self.adapter is None or self.job.merge:
            policy.save(engine, target / "policy", dtype=dtype)
        if self.adapter is not None and self.rank == 0:
            lora.save(self.adapter, target / lora.FOLDER, getattr(torch, dtype))
        if self.job.save_optimizer:
            found = checkpoint.fragments(engine.engine, trainable(engine.model), rank=self.rank)
            checkpoint.save(
                target / "optimizer", found, engine.optimizer, rank=self.rank, world_size=self.world_size,
                masters=lambda name: dtype != "float32" or name.startswith(checkpoint.CRITIC),
                shared=self.settings.zero_stage == 0,
            )  # fmt: skip
