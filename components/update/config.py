"""Settings of the update stage: the algorithm, the optimizer, the engine and the limits that stop a run."""

from typing import Literal

from pydantic import Field, model_validator

from components.common.patched import DeltaSettings
from components.common.settings import Settings

AUTOMATIC_TOKENS = {"cuda": 16_384, "cpu": 2_048}
"""What `max_tokens_per_microbatch = "auto"` is on a device: on a CPU 2,048 tokens of a small model take 0.6 of the time
they take in one micro-batch of 16,384."""

Dtype = Literal["auto", "float32", "bfloat16"]
CorrectionMode = Literal["none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]


class LoraSettings(Settings):
    """Low-rank adapters (arXiv:2106.09685) instead of all weights."""

    rank: int = Field(default=0, ge=0)
    """Rank of the adapter matrices; 0 trains all weights."""
    alpha: float = Field(default=32.0, gt=0)
    """The adapter's product is scaled by alpha / rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of the adapter's inputs dropped in training; anything but 0 makes old and new log-probabilities differ."""
    targets: list[str] = ["all-linear"]
    """Names of the linear modules that get an adapter, such as `q_proj`; `all-linear`: every one but the head."""
    publish: Literal["adapter", "merged"] = "adapter"
    """`adapter`: policies within a run are the base model's files plus `adapter/`, a few MB new an iteration, and the
    run's last policy is merged; `merged`: every policy has merged weights, for samplers that load no adapters."""


class PpoSettings(Settings):
    """The critic of `algorithm = "ppo"`; ignored by every other algorithm."""

    value_learning_rate: float = Field(default=1e-5, gt=0)
    """Learning rate of the critic."""
    value_clip: float | None = Field(default=0.2, gt=0)
    """How far a value may move from its old one before its loss is held, in reward units; none: not held."""
    value_coefficient: float = Field(default=0.5, gt=0)
    """Weight of the critic's loss beside the policy's."""
    gamma: float = Field(default=1.0, gt=0, le=1)
    """Discount of a reward by each token that precedes it."""
    gae_lambda: float = Field(default=1.0, ge=0, le=1)
    """GAE's lambda (arXiv:1506.02438): 1 is the return minus the value, 0 the one-step difference."""
    whiten_advantages: bool = True
    """Bring the batch's advantages to mean 0 and deviation 1."""


class HealthSettings(Settings):
    """Limits of a healthy update; crossing one fails the iteration and keeps the last good policy."""

    max_skipped_steps: int = Field(default=3, ge=0)
    """Optimizer steps in a row, over iterations too, that may be skipped for a gradient that is not finite."""
    max_kl: float | None = Field(default=None, gt=0)
    """Highest mean KL to the reference, nats a token; needs `beta > 0`."""
    max_logp_difference: float | None = Field(default=1.0, gt=0)
    """Highest mean |log p(trainer) - log p(sampler)| of the batch before the update, nats a token; the default lets all
    pass but samples of other weights or another distribution."""
    max_sampling_kl: float | None = Field(default=None, gt=0)
    """Highest KL of the sampler to the trainer before the update (`sampling/kl_k3`), nats a token."""
    min_entropy: float | None = Field(default=None, ge=0)
    """Lowest mean entropy of the policy, nats a token; below it sampling has collapsed."""
    max_zero_std_share: float | None = Field(default=None, ge=0, le=1)
    """Highest share of groups whose rewards are all equal."""


class UpdateSettings(Settings):
    """One iteration's policy update."""

    algorithm: Literal["grpo", "ppo"] = "grpo"
    """`grpo`: the group's other completions are the baseline; `ppo`: a critic of the policy's size is."""
    loss_type: Literal["grpo", "dapo", "dr_grpo", "gspo", "cispo"] = "dapo"
    """How token losses are clipped and averaged; `docs/algorithm.md` has the formulas."""
    epsilon_low: float | None = Field(default=None, ge=0)
    """The probability ratio is clipped below 1 - epsilon_low; unset: the loss's own, 0.2 for most."""
    epsilon_high: float | None = Field(default=None, ge=0)
    """The probability ratio is clipped above 1 + epsilon_high; unset: the loss's own, 0.28 for `dapo`."""
    dual_clip: float | None = Field(default=None, gt=1)
    """For negative advantages, the ratio beyond which the loss stops growing (3.0 is usual); unset: not used."""
    advantage_baseline: Literal["mean", "leave_one_out"] = "mean"
    """What a reward is compared with: the mean of its group, or of the group's others."""
    advantage_scale: Literal["group", "batch", "none"] = "group"
    """Divide advantages by the standard deviation of the group, of the whole batch, or not at all."""
    reward_combination: Literal["sum_then_normalize", "normalize_then_sum"] = "sum_then_normalize"
    """With several reward functions: normalise their weighted sum, or each by itself and then add (GDPO)."""
    beta: float = Field(default=0.0, ge=0)
    """KL coefficient to the reference model; 0: no reference model is fetched or loaded."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """Estimator of the KL divergence; k1 belongs in the reward, or in the loss with `kl_ratio`; k2, k3 in the loss."""
    kl_in: Literal["loss", "reward"] = "loss"
    """Where the KL penalty acts: differentiated in the loss, or subtracted from the reward."""
    kl_ratio: bool = False
    """Multiply the KL estimate in the loss by the probability ratio, which makes its gradient unbiased off-policy."""
    reference_every: int = Field(default=0, ge=0)
    """The reference becomes the present policy every so many iterations; 0: it stays the fine-tune's start policy."""
    correction: CorrectionMode = "token_truncate"
    """Importance weight for the sampler's log-probabilities differing from the trainer's: of a token or of a whole
    completion, held at the cap or masked above it."""
    correction_cap: float = Field(default=2.0, gt=1)
    """Highest importance weight: truncated there, or masked above it."""
    correction_floor: float | None = Field(default=None, gt=0, lt=1)
    """Lowest importance weight; unset: no lower bound."""
    num_epochs: int = Field(default=1, ge=1)
    """Passes over the batch."""
    num_minibatches: int = Field(default=1, ge=1)
    """Optimizer steps a pass; prompts are spread evenly over them, a group is never cut."""
    mask_truncated: bool = False
    """Leave completions that hit the length limit out of the loss."""
    overlong_buffer: int = Field(default=0, ge=0)
    """Tokens before the length limit over which a penalty grows from 0 to `overlong_penalty`; 0: no penalty."""
    overlong_penalty: float = Field(default=1.0, gt=0)
    """Reward lost by a completion at the length limit, when `overlong_buffer` is set."""
    entropy_coefficient: float = 0.0
    """Weight of the mean token entropy, added to the objective."""

    learning_rate: float = Field(default=1e-6, gt=0)
    """Highest learning rate of AdamW."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How the learning rate falls after the warm-up."""
    schedule_steps: int = Field(default=0, ge=0)
    """Optimizer steps of the whole fine-tune over which a `linear` or `cosine` schedule falls to its end."""
    final_learning_rate_share: float = Field(default=0.0, ge=0, le=1)
    """Share of `learning_rate` left at the end of the schedule."""
    warmup_steps: int = Field(default=0, ge=0)
    """First optimizer steps of the fine-tune over which the learning rate rises linearly."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay of AdamW; matrices only."""
    adam_betas: tuple[float, float] = (0.9, 0.999)
    """Decay of AdamW's first and second moments."""
    adam_epsilon: float = Field(default=1e-8, gt=0)
    """Added to the root of AdamW's second moment."""
    max_grad_norm: float = Field(default=1.0, ge=0)
    """Gradients with a larger norm are scaled down to it, PPO's of policy and critic as one; 0: never."""
    carry_optimizer: bool = True
    """Take AdamW's moments (and float32 master weights) over from the last iteration; else they start anew."""
    optimizer_every: int = Field(default=1, ge=1)
    """Publish the optimizer state after every so many iterations. In between the older moments are carried and master
    weights are taken from the policy: less storage traffic, updates below bfloat16's resolution are lost."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; `auto`: on GPUs where there are any."""
    nodes: int = Field(default=1, ge=1, le=256)
    """Machines of one update; above 1 a Kubeflow TrainJob on a cluster, each node a pod of `[cluster.update]`."""
    num_processes: Literal["auto"] | int = "auto"
    """Processes a node; `auto`: one a GPU, one on CPU."""
    num_threads: int = Field(default=0, ge=0)
    """CPU threads a process; 0: the cores divided by the processes."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """DeepSpeed ZeRO, what processes divide: 0 nothing, 1 optimizer state, 2 gradients too, 3 weights too."""
    offload_optimizer: bool = False
    """Keep optimizer state in host memory and step there; ZeRO 1 to 3."""
    offload_parameters: bool = False
    """Keep weights in host memory between uses; ZeRO 3."""
    dtype: Dtype = "auto"
    """Type of weights and activations, beside float32 master weights; `auto`: bfloat16 on GPU, float32 on CPU."""
    publish_dtype: Dtype = "auto"
    """Type of the published weights; `auto`: as the start policy has them."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them: less memory, about a third more time."""
    layout: Literal["packed", "padded"] = "packed"
    """`packed`: sequences one after another, no padding; `padded`: for models with other layers than full and
    sliding attention, which `packed` refuses."""
    max_tokens_per_microbatch: Literal["auto"] | int = "auto"
    """Tokens of one forward and backward pass on one process; a longer sequence is a micro-batch of its own. `auto`:
    16,384 on GPU, 2,048 on CPU, where a larger one falls out of the cache."""

    lora: LoraSettings = LoraSettings()
    """Low-rank adapters."""
    ppo: PpoSettings = PpoSettings()
    """The critic of PPO."""
    delta: DeltaSettings = DeltaSettings()
    """Storing the policy as a patch of the one before."""
    health: HealthSettings = HealthSettings()
    """Limits that stop a run."""

    @model_validator(mode="after")
    def _mend(self) -> "UpdateSettings":
        for wrong, message in self._contradictions():
            if wrong:
                raise ValueError(message)
        return self

    def _contradictions(self) -> list[tuple[bool, str]]:
        return [*self._algorithm(), *self._without_effect(), *self._engine(), *self._lora()]

    def _algorithm(self) -> list[tuple[bool, str]]:
        on_reward, ppo = self.kl_in == "reward", self.algorithm == "ppo"
        several = self.reward_combination != "sum_then_normalize"
        return [
            (self.beta > 0 and not on_reward and self.kl_estimator == "k1" and not self.kl_ratio,
             "k1 alone has a gradient of mean zero in the loss; set kl_ratio = true, kl_estimator = \"k3\", or "
             "kl_in = \"reward\""),
            (self.schedule != "constant" and self.schedule_steps <= self.warmup_steps,
             f"schedule = \"{self.schedule}\" needs schedule_steps above warmup_steps = {self.warmup_steps}, "
             f"got {self.schedule_steps}; count the optimizer steps of the whole fine-tune"),
            (self.health.max_kl is not None and self.beta == 0,
             "health.max_kl needs the reference model; set beta above 0 (1e-6 hardly steers), or remove max_kl"),
            (ppo and not (self.carry_optimizer and self.optimizer_every == 1),
             "algorithm = \"ppo\" keeps its critic beside the optimizer state; leave carry_optimizer = true, "
             "optimizer_every = 1"),
            (ppo and several,
             "algorithm = \"ppo\" has one reward a completion; set reward_combination = \"sum_then_normalize\""),
            (on_reward and self.beta > 0 and several,
             "kl_in = \"reward\" takes the penalty from one total; set reward_combination = \"sum_then_normalize\""),
            (ppo and self.loss_type == "gspo",
             "algorithm = \"ppo\" has an advantage a token, gspo a ratio a sequence; set loss_type = \"dapo\""),
        ]  # fmt: skip

    def _without_effect(self) -> list[tuple[bool, str]]:
        """Settings that another one switches off: refused rather than ignored."""
        group_baseline = self._changed("advantage_baseline") or self._changed("advantage_scale")
        return [
            (self.correction_floor is not None and self.correction == "none",
             "correction_floor has no effect with correction = \"none\"; remove one of the two"),
            (self._changed("correction_cap") and self.correction == "none",
             "correction_cap has no effect with correction = \"none\"; remove one of the two"),
            (self.dual_clip is not None and self.loss_type == "cispo",
             "dual_clip has no effect with loss_type = \"cispo\", which bounds every token's weight; remove dual_clip"),
            (group_baseline and self.algorithm == "ppo",
             "advantage_baseline and advantage_scale are of groups, algorithm = \"ppo\" has a critic; remove them"),
            (self._changed("advantage_scale") and self.reward_combination == "normalize_then_sum",
             "advantage_scale has no effect with reward_combination = \"normalize_then_sum\", which has its own; "
             "remove one of the two"),
            (self.kl_ratio and self.kl_in == "reward",
             "kl_ratio is of the penalty in the loss and has no effect with kl_in = \"reward\"; remove one of the two"),
        ]  # fmt: skip

    def _engine(self) -> list[tuple[bool, str]]:
        return [
            (self.num_processes != "auto" and self.num_processes < 1,
             f"num_processes must be \"auto\" or at least 1, got {self.num_processes}"),
            (self.max_tokens_per_microbatch != "auto" and self.max_tokens_per_microbatch < 1,
             f"max_tokens_per_microbatch must be \"auto\" or at least 1, got {self.max_tokens_per_microbatch}"),
            (self.zero_stage == 0 and self.dtype == "bfloat16",
             "zero_stage = 0 adds gradients up in bfloat16; set zero_stage = 1 (the same memory on one process)"),
            (self.offload_optimizer and self.zero_stage == 0,
             "offload_optimizer needs zero_stage 1, 2 or 3; set zero_stage = 1"),
            (self.offload_parameters and self.zero_stage != 3, "offload_parameters needs zero_stage = 3"),
        ]  # fmt: skip

    def _lora(self) -> list[tuple[bool, str]]:
        if not self.lora.rank:
            return []
        return [
            (self.algorithm == "ppo", "algorithm = \"ppo\" trains all weights; set lora.rank = 0"),
            (not self.carry_optimizer,
             "a merged policy's adapter is kept with the optimizer state; leave carry_optimizer = true"),
            (self.lora.publish == "merged" and self.optimizer_every > 1,
             "a merged policy's adapter is kept with the optimizer state; set optimizer_every = 1, or "
             "lora.publish = \"adapter\""),
            (self.zero_stage == 3, "LoRA leaves little to divide and runs with zero_stage 0 to 2; set zero_stage = 2"),
        ]  # fmt: skip

    def _changed(self, name: str) -> bool:
        """Whether a setting differs from its default; stages read settings back with every field set."""
        return getattr(self, name) != type(self).model_fields[name].default
