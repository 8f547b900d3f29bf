"""The KFP face of update."""

from kfp import dsl


@dsl.component(base_image="grpo-pipeline/update-python", install_kfp_package=False)
def update(
    settings: str,
    iteration: int,
    policy: dsl.Input[dsl.Artifact],
    optimizer: dsl.Input[dsl.Artifact],
    reference: dsl.Input[dsl.Artifact],
    scored: dsl.Input[dsl.Artifact],
    next_policy: dsl.Output[dsl.Artifact],
    next_optimizer: dsl.Output[dsl.Artifact],
    metrics: dsl.Output[dsl.Metrics],
):
    """Updates a policy on its scored rollouts."""
    from pathlib import Path

    from components.common.tracking import log_kfp_metrics
    from components.update.stage import run

    run(
        settings=settings,
        iteration=iteration,
        policy=Path(policy.path),
        optimizer=Path(optimizer.path),
        reference=Path(reference.path),
        scored=Path(scored.path),
        next_policy=Path(next_policy.path),
        next_optimizer=Path(next_optimizer.path),
    )
    log_kfp_metrics(metrics, Path(next_policy.path))
