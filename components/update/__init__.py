"""The update stage: DeepSpeed GRPO, and PPO to compare it with."""
