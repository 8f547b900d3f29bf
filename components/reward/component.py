"""The KFP faces of reward: one rollout, or the collected shards of one."""

from kfp import dsl


@dsl.component(base_image="grpo-pipeline/cpu-python", install_kfp_package=False)
def reward(settings: str, completions: dsl.Input[dsl.Artifact], scored: dsl.Output[dsl.Artifact]):
    """Scores the completions of one rollout."""
    from pathlib import Path

    from components.reward.stage import run

    run(settings=settings, completions=[Path(completions.path)], scored=Path(scored.path))


@dsl.component(base_image="grpo-pipeline/cpu-python", install_kfp_package=False)
def reward_shards(settings: str, completions: dsl.Input[list[dsl.Artifact]], scored: dsl.Output[dsl.Artifact]):
    """Scores the completions of all shards of a rollout, merged."""
    from pathlib import Path

    from components.reward.stage import run

    run(settings=settings, completions=[Path(shard.path) for shard in completions], scored=Path(scored.path))
