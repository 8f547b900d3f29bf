"""The worker: one process of the update, started by `launch.py` on every device.

    S completions      N completion tokens of a micro-batch      W ranks
"""

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from components.common.errors import HealthError
from components.update import checkpoint, policy
from components.update.batching import Batch, Step, cut, deal, plan_steps
from components.update.correction import off_policy_correction
from components.update.engine import Engine
from components.update.head import TokenLoss
from components.update.health import check_figures
from components.update.job import Job, Result
from components.update.kl import kl_estimate
from components.update.losses import DEFAULT_CLIP, BatchTotals, combine, policy_loss, sequence_weights
from components.update.metrics import Meter, model_flops, peak_flops, peak_memory_bytes
from components.update.model import MicroBatch, ScoringModel, collate, load_policy, scoring, trainable


@dataclass
class Columns:
    """The batch's flat columns, on the host; each rank has all of them."""

    behaviour: np.ndarray
    """float32: the sampler's log-probability of each completion token."""
    old: np.ndarray | None = None
    """float32: the trainer's, before the first step; None: the present ones, without a pass of their own."""
    reference: np.ndarray | None = None
    """float32: the reference model's."""


class Trainer:
    """One iteration's optimizer steps on one rank."""

    def __init__(self, folder: Path, job: Job) -> None:
        self.folder, self.job, self.settings = folder, job, job.settings
        self.rank, self.world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        self.device = _device(job)
        self.dtype = getattr(torch, job.dtype)
        self.padded = self.settings.layout == "padded"
        self.meter = Meter(self.device)
        self.batch = Batch.load(folder / "batch.npz")
        self.columns = Columns(self.batch.behaviour_logprobs)
        low, high = DEFAULT_CLIP[self.settings.loss_type]
        self.epsilon_low = low if self.settings.epsilon_low is None else self.settings.epsilon_low
        self.epsilon_high = high if self.settings.epsilon_high is None else self.settings.epsilon_high

    def run(self) -> Result:
        """Trains, checks the figures' health, writes `next/`."""
        started = time.monotonic()
        steps = self._plan()
        if self.settings.beta > 0:
            self.columns.reference = self._reference_logprobs()
        engine = self._engine()
        if len(steps) > 1:
            self.columns.old = self._logprobs(engine.engine, self._all_kept())
        ready = time.monotonic()
        skipped = sum(not self._step(engine, step, number) for number, step in enumerate(steps))
        trained = time.monotonic()
        figures = self.meter.read() | self._speed(engine, steps, trained - ready, trained - started)
        figures["skipped_steps"] = skipped
        check_figures(self.settings, figures)
        self._save(engine)
        return Result(metrics=figures, global_step=self.job.global_step + len(steps) - skipped)

    def _plan(self) -> list[Step]:
        return plan_steps(
            self.batch, num_epochs=self.settings.num_epochs, num_minibatches=self.settings.num_minibatches,
            num_ranks=self.world_size, max_tokens=self.settings.max_tokens_per_microbatch, seed=self.job.seed,
            padded=self.padded,
        )  # fmt: skip

    def _engine(self) -> Engine:
        loaded = load_policy(
            self.folder / "policy", dtype=self.dtype, padded=self.padded,
            checkpointing=self.settings.gradient_checkpointing,
        )  # fmt: skip
        model, state = ScoringModel(loaded), self.folder / "optimizer"
        if self.job.restore == "all" and self.dtype == torch.float32 and self.job.publish_dtype != "float32":
            checkpoint.load_masters(state, trainable(model))
        engine = Engine(model, self.settings, dtype=self.job.dtype, device=self.device)
        if self.job.restore != "nothing":
            pieces = checkpoint.fragments(engine.engine, trainable(engine.model), rank=self.rank)
            masters = self.job.restore == "all" and self.dtype != torch.float32
            checkpoint.restore(state, pieces, engine.optimizer, master=masters)
        return engine

    def _reference_logprobs(self) -> np.ndarray:
        """The reference model's log-probabilities; the model is gone afterwards."""
        loaded = load_policy(self.folder / "reference", dtype=self.dtype, padded=self.padded)
        return self._logprobs(ScoringModel(loaded).to(self.device), self._all_kept())

    def _all_kept(self) -> np.ndarray:
        return np.flatnonzero(self.batch.keep)

    def _logprobs(self, model: torch.nn.Module, sequences: np.ndarray) -> np.ndarray:
        """Log-probabilities of the sequences' completion tokens, without gradients, shared over the ranks."""
        settings = self.settings
        parts = cut(
            sequences, self.batch.model_lengths[sequences], settings.max_tokens_per_microbatch,
            multiple=self.world_size, padded=self.padded,
        )  # fmt: skip
        found = torch.zeros(len(self.columns.behaviour), dtype=torch.float32)
        with scoring(model) as score:
            for part in deal(parts, self.batch.model_lengths, self.world_size)[self.rank]:
                micro = self._collate(part)
                found[micro.flat_N] = score(micro, self.job.temperature)[1].float().cpu()
        shared = found.to(self.device)
        torch.distributed.all_reduce(shared)
        return shared.cpu().numpy()

    def _collate(self, sequences: np.ndarray) -> MicroBatch:
        return collate(self.batch, sequences, padded=self.padded, device=self.device)

    def _step(self, engine: Engine, step: Step, number: int) -> bool:
        """One optimizer step; False when it was skipped for a gradient that is not finite."""
        lengths_S = self.batch.scored_lengths
        totals = BatchTotals.of(lengths_S[step.members], self.job.max_completion_length)
        weights_S = np.zeros(len(lengths_S))
        weights_S[step.members] = sequence_weights(self.settings.loss_type, lengths_S[step.members], totals)
        rate = engine.set_learning_rate(self.job.global_step + number)
        micro_batches, loss_sum = step.ranks[self.rank], 0.0
        for position, sequences in enumerate(micro_batches):
            micro = self._collate(sequences)
            tokens = TokenTensors.of(self, micro, weights_S)
            loss, logprobs_N, entropy_N = self._forward(engine, micro, tokens, totals)
            loss_sum = loss_sum + loss.detach() / self.world_size
            engine.backward(loss, last=position == len(micro_batches) - 1)
            self._measure(micro, tokens, logprobs_N.detach(), entropy_N.detach())
        norm, applied = engine.step()
        self.meter.add("loss", loss_sum if applied else 0.0, (1 if applied else 0) / self.world_size)
        self.meter.add("grad_norm", norm if applied else 0.0, 1 if applied else 0)
        self.meter.add("learning_rate", rate, 1)
        if not applied:
            self._skipped = getattr(self, "_skipped", 0) + 1
            if self._skipped > self.settings.health.max_skipped_steps:
                raise HealthError(
                    f"loss or gradient was not finite in {self._skipped} optimizer steps (health.max_skipped_steps = "
                    f"{self.settings.health.max_skipped_steps}); lower learning_rate, or look for NaN in the rewards"
                )
        return applied

    def _forward(
        self, engine: Engine, micro: MicroBatch, tokens: "TokenTensors", totals: BatchTotals
    ) -> tuple[Tensor, Tensor, Tensor]:
        """This micro-batch's share of the loss, times the ranks; log-probabilities and entropies (N,)."""
        token_loss = self._token_loss(micro, tokens, totals)
        if self._each_token_alone:
            return engine.engine(micro, self.job.temperature, token_loss)
        _, logprobs_N, entropy_N = engine.engine(micro, self.job.temperature)
        return token_loss(logprobs_N, entropy_N, slice(None)), logprobs_N, entropy_N

    @property
    def _each_token_alone(self) -> bool:
        """Whether a token's loss needs no other token of its sequence; then gradients come with the forward pass."""
        by_sequence = self.settings.correction == "sequence_mask" and self.columns.old is None
        return self.settings.loss_type != "gspo" and not by_sequence

    def _token_loss(self, micro: MicroBatch, tokens: "TokenTensors", totals: BatchTotals) -> TokenLoss:
        settings, world_size, num_sequences = self.settings, self.world_size, len(micro.sequences)

        def token_loss(logprobs_n: Tensor, entropy_n: Tensor, chunk: slice) -> Tensor:
            old_n = None if tokens.old_N is None else tokens.old_N[chunk]
            sequence_n = micro.sequence_N[chunk]
            loss_n = policy_loss(
                settings.loss_type, logprobs_n, old_n, tokens.advantages_N[chunk], sequence_n, num_sequences,
                epsilon_low=self.epsilon_low, epsilon_high=self.epsilon_high, dual_clip=settings.dual_clip,
            ).loss_N  # fmt: skip
            correction = off_policy_correction(
                settings.correction, logprobs_n if old_n is None else old_n, tokens.behaviour_N[chunk], sequence_n,
                num_sequences, cap=settings.correction_cap, floor=settings.correction_floor,
            )  # fmt: skip
            in_loss = tokens.reference_N is not None and settings.kl_in == "loss"
            kl_n = kl_estimate(settings.kl_estimator, logprobs_n, tokens.reference_N[chunk]) if in_loss else None
            return world_size * combine(
                loss_n, tokens.weights_N[chunk], correction_N=correction.weights_N, kl_N=kl_n, beta=settings.beta,
                entropy_N=entropy_n, entropy_coefficient=settings.entropy_coefficient, num_tokens=totals.num_tokens,
            )  # fmt: skip

        return token_loss

    def _measure(self, micro: MicroBatch, tokens: "TokenTensors", logprobs_N: Tensor, entropy_N: Tensor) -> None:
        """TRL's token figures of one micro-batch."""
        meter, settings = self.meter, self.settings
        old_N = logprobs_N if tokens.old_N is None else tokens.old_N
        found = policy_loss(
            settings.loss_type, logprobs_N, old_N, tokens.advantages_N, micro.sequence_N, len(micro.sequences),
            epsilon_low=self.epsilon_low, epsilon_high=self.epsilon_high,
        )  # fmt: skip
        correction = off_policy_correction(
            settings.correction, old_N, tokens.behaviour_N, micro.sequence_N, len(micro.sequences),
            cap=settings.correction_cap, floor=settings.correction_floor,
        )  # fmt: skip
        meter.mean("entropy", entropy_N)
        meter.mean("clip_ratio/low_mean", found.clipped_low_N)
        meter.mean("clip_ratio/high_mean", found.clipped_high_N)
        meter.mean("clip_ratio/region_mean", found.clipped_low_N | found.clipped_high_N)
        difference = correction.difference_N[~correction.difference_N.isnan()]
        meter.mean("sampling/sampling_logp_difference/mean", difference)
        meter.max("sampling/sampling_logp_difference/max", difference)
        meter.min("sampling/importance_sampling_ratio/min", correction.ratio)
        meter.mean("sampling/importance_sampling_ratio/mean", correction.ratio)
        meter.max("sampling/importance_sampling_ratio/max", correction.ratio)
        if tokens.reference_N is not None:
            meter.mean("kl", kl_estimate(settings.kl_estimator, logprobs_N, tokens.reference_N))

    def _speed(self, engine: Engine, steps: list[Step], training: float, total: float) -> dict[str, float]:
        """Tokens, seconds, memory and, on a known GPU, model FLOP utilisation."""
        used = np.concatenate([part for step in steps for parts in step.ranks for part in parts])
        lengths = self.batch.model_lengths[used]
        cells = sum(self._cells(part) for step in steps for parts in step.ranks for part in parts)
        config = engine.model.policy.config
        flops = model_flops(
            sum(getattr(p, "ds_numel", p.numel()) for p in engine.model.parameters()), config.num_hidden_layers,
            config.hidden_size, lengths.tolist(), passes=3.0,
        )  # fmt: skip
        peak = peak_flops(self.device)
        memory = torch.tensor(float(peak_memory_bytes(self.device)), device=self.device)
        torch.distributed.all_reduce(memory, op=torch.distributed.ReduceOp.MAX)
        figures = {
            "num_tokens": float(lengths.sum()), "step_time": training, "setup_time": total - training,
            "tokens_per_second": float(lengths.sum()) / training, "padding_share": 1.0 - float(lengths.sum()) / cells,
            "peak_memory_bytes": memory.item(), "num_steps": float(len(steps)),
        }  # fmt: skip
        return figures if peak is None else figures | {"mfu": flops / training / peak / self.world_size}

    def _cells(self, part: np.ndarray) -> int:
        lengths = self.batch.model_lengths[part]
        return int(lengths.max(initial=1)) * max(len(part), 1) if self.padded else max(int(lengths.sum()), 1)

    def _save(self, engine: Engine) -> None:
        target = self.folder / "next"
        policy.save(engine, target / "policy", source=self.folder / "policy", dtype=self.job.publish_dtype)
        if self.job.save_optimizer:
            found = checkpoint.fragments(engine.engine, trainable(engine.model), rank=self.rank)
            masters = self.job.publish_dtype != "float32"
            checkpoint.save(
                target / "optimizer", found, engine.optimizer, rank=self.rank, world_size=self.world_size,
                master=masters, shared=self.settings.zero_stage == 0,
            )  # fmt: skip


@dataclass(frozen=True)
class TokenTensors:
    """A micro-batch's columns on the device, one entry a completion token."""

    advantages_N: Tensor
    weights_N: Tensor
    behaviour_N: Tensor
    old_N: Tensor | None
    reference_N: Tensor | None

    @classmethod
    def of(cls, trainer: Trainer, micro: MicroBatch, weights_S: np.ndarray) -> "TokenTensors":
        """Gathers the columns of the micro-batch's tokens."""

        def tokens(column: np.ndarray | None) -> Tensor | None:
            if column is None:
                return None
            return torch.from_numpy(np.asarray(column[micro.flat_N], dtype=np.float32)).to(trainer.device)

        def spread(values_S: np.ndarray) -> Tensor:
            values = torch.from_numpy(values_S[micro.sequences].astype(np.float32)).to(trainer.device)
            return values[micro.sequence_N]

        columns = trainer.columns
        return cls(
            spread(trainer.batch.advantages), spread(weights_S), tokens(columns.behaviour), tokens(columns.old),
            tokens(columns.reference),
        )  # fmt: skip


def _device(job: Job) -> torch.device:
    import os

    return torch.device("cuda", int(os.environ["LOCAL_RANK"])) if job.device == "cuda" else torch.device("cpu")
