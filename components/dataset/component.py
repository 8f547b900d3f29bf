"""The KFP face of dataset."""

from kfp import dsl


@dsl.component(base_image="grpo-pipeline/cpu-python", install_kfp_package=False)
def dataset(
    settings: str,
    policy: dsl.Input[dsl.Artifact],
    prompts: dsl.Output[dsl.Artifact],
) -> str:
    """Makes train and eval prompts of a data set, tokenised for the policy."""
    from pathlib import Path

    from components.dataset.stage import run

    return run(settings=settings, policy=Path(policy.path), prompts=Path(prompts.path))
