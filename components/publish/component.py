"""The KFP face of publish."""

from kfp import dsl


@dsl.component(base_image="grpo-pipeline/cpu-python", install_kfp_package=False)
def publish(
    settings: str,
    policy: dsl.Input[dsl.Artifact],
    evaluation: dsl.Input[dsl.Artifact],
    decision: dsl.Output[dsl.Artifact],
    summary: dsl.Output[dsl.Markdown],
    metrics: dsl.Output[dsl.Metrics],
):
    """Accepts or rejects the run's last policy against the champion of the fine-tune."""
    from pathlib import Path

    from components.common.tracking import log_kfp_metrics
    from components.publish.stage import run

    run(
        settings=settings,
        policy=Path(policy.path),
        evaluation=Path(evaluation.path),
        decision=Path(decision.path),
        summary=Path(summary.path),
    )
    log_kfp_metrics(metrics, Path(decision.path))
