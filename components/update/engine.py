"""DeepSpeed around the policy: one optimizer step from gradients summed over micro-batches and ranks.

A micro-batch's loss is its share of the whole batch's loss, so gradients are added up, never averaged: the number of
micro-batches and of ranks changes nothing. DeepSpeed averages over ranks; losses are multiplied by their number.
"""

import math
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from components.update.config import UpdateSettings


@contextmanager
def _what_is_needed() -> Iterator[None]:
    """Keeps DeepSpeed's modules from importing what is not used here: MLflow, for the autotuner (1.5 s of each start),
    and torch's compiler, for a decorator in the Muon optimizer (1.2 s in each worker under ZeRO 1 to 3).
    """
    hidden, compile_ = "mlflow" not in sys.modules, torch.compile
    torch.compile = lambda function=None, **_: function or (lambda function: function)
    if hidden:
        sys.modules["mlflow"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = compile_
        if hidden:
            del sys.modules["mlflow"]


def import_deepspeed() -> Any:
    """DeepSpeed, quiet, and without its shared-memory collectives, which it would compile at first use on a CPU."""
    import logging

    if not torch.cuda.device_count():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed warns that it found none
    with _what_is_needed():
        import deepspeed
        import deepspeed.module_inject.auto_ep_layer
        import deepspeed.runtime.zero.muon.muon_optimizer
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.utils.logger.setLevel(logging.WARNING)
    return deepspeed


def deepspeed_config(settings: UpdateSettings, dtype: str) -> dict[str, Any]:
    """Configuration of DeepSpeed for these settings; batch sizes are ours, so DeepSpeed's stay at 1."""
    zero: dict[str, Any] = {"stage": settings.zero_stage}
    if settings.zero_stage:
        zero |= {"contiguous_gradients": True, "overlap_comm": False}
    if settings.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if settings.offload_parameters:
        zero["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": settings.max_grad_norm if settings.zero_stage else 0.0,
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1 << 62,
    }
    if dtype == "bfloat16":
        config["bf16"] = {"enabled": True, "check_grad_overflow": True}
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    return config


def learning_rate_share(settings: UpdateSettings, step: int) -> float:
    """Share of the highest learning rate at optimizer step `step` of the fine-tune, counted from 0."""
    if step < settings.warmup_steps:
        return (step + 1) / settings.warmup_steps
    if settings.schedule == "constant":
        return 1.0
    done = min((step - settings.warmup_steps) / (settings.schedule_steps - settings.warmup_steps), 1.0)
    left = 1.0 - done if settings.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
    return settings.final_learning_rate_share + (1.0 - settings.final_learning_rate_share) * left


def parameter_groups(model: nn.Module, settings: UpdateSettings, critic: Iterable[Tensor] = ()) -> list[dict[str, Any]]:
    """AdamW's groups: weights that decay, those that do not, and the critic's, which has its own learning rate."""
    critic_ids = {id(parameter) for parameter in critic}
    groups: dict[tuple[bool, bool], list[Tensor]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            shape = getattr(parameter, "ds_shape", parameter.shape)
            decays = settings.weight_decay > 0 and len(shape) > 1
            groups.setdefault((id(parameter) in critic_ids, decays), []).append(parameter)
    rates = {False: settings.learning_rate, True: settings.ppo.value_learning_rate}
    return [
        {"params": members, "lr": rates[critic], "highest_lr": rates[critic],
         "weight_decay": settings.weight_decay if decays else 0.0}
        for (critic, decays), members in groups.items()
    ]  # fmt: skip


def for_reading(model: nn.Module, settings: UpdateSettings, *, dtype: str, device: torch.device) -> nn.Module:
    """A model that does not train, on the device: under ZeRO 3 divided over the ranks, else whole on each."""
    if settings.zero_stage != 3:
        return model.to(device)
    config = deepspeed_config(settings, dtype)
    config["zero_optimization"].pop("offload_optimizer", None)  # there is none
    return import_deepspeed().initialize(model=model, config=config, dist_init_required=False)[0]


class Engine:
    """A model, its optimizer and DeepSpeed's division of them."""

    def __init__(
        self,
        model: nn.Module,
        settings: UpdateSettings,
        *,
        dtype: str,
        device: torch.device,
        critic: Iterable[Tensor] = (),
    ) -> None:
        self.settings, self.device = settings, device
        self.world_size = torch.distributed.get_world_size()
        self.rank = torch.distributed.get_rank()
        optimizer = torch.optim.AdamW(
            parameter_groups(model, settings, critic), betas=settings.adam_betas, eps=settings.adam_epsilon, fused=True
        )
        self.engine, *_ = import_deepspeed().initialize(
            model=model, optimizer=optimizer, config=deepspeed_config(settings, dtype), dist_init_required=False
        )
        if self.world_size == 1 and not settings.zero_stage:
            self.engine.enable_backward_allreduce = False  # nothing to add up, and each gradient would be copied
        self.model: nn.Module = self.engine.module
        self.engine.train()

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The AdamW that steps, inside DeepSpeed's wrapper."""
        wrapper = self.engine.optimizer
        return wrapper.optimizer if self.settings.zero_stage else wrapper

    def set_learning_rate(self, step: int) -> float:
        """Sets every group's rate for optimizer step `step` of the fine-tune; gives the policy's."""
        share = learning_rate_share(self.settings, step)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = share * group["highest_lr"]
        return share * self.settings.learning_rate

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Adds a micro-batch's gradients; `last`: the step's last, after which they are summed over the ranks."""
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss, scale_wrt_gas=False)

    def step(self) -> tuple[float, bool]:
        """One optimizer step; gives the gradients' norm before clipping, and False when it was not finite: no step."""
        if self.settings.zero_stage:
            self.engine.step()
            norm = float(self.engine.get_global_grad_norm())
            return norm, bool(self.engine.was_step_applied())
        parameters = [parameter for parameter in self.model.parameters() if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters])
        if not torch.isfinite(norm):
            self.engine.zero_grad()
            return float(norm), False
        if self.settings.max_grad_norm:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.settings.max_grad_norm, norm)
        self.engine.step()
        return float(norm), True
