"""KFP face of the rollout stage: import, call, log."""

from kfp import dsl


@dsl.component(base_image="grpo-pipeline/rollout-python", install_kfp_package=False)
def rollout(
    settings: dsl.Input[dsl.Artifact],  # a file: kfp.local 2.17 gives a parameter inside a loop the loop's item
    iteration: int,
    shard: int,
    policy: dsl.Input[dsl.Artifact],
    prompts: dsl.Input[dsl.Artifact],
    completions: dsl.Output[dsl.Artifact],
):
    """Samples completions from a policy."""
    from components.rollout.stage import run

    run(
        settings=settings.path, iteration=iteration, shard=shard,
        policy=policy.path, prompts=prompts.path, completions=completions.path,
    )  # fmt: skip
