"""The KFP face of evaluate."""

from kfp import dsl


@dsl.component(base_image="grpo-pipeline/cpu-python", install_kfp_package=False)
def evaluate(
    settings: str,
    iteration: int,
    policy: dsl.Input[dsl.Artifact],
    scored: dsl.Input[dsl.Artifact],
    history: dsl.Input[dsl.Artifact],
    evaluation: dsl.Output[dsl.Artifact],
    report: dsl.Output[dsl.HTML],
    summary: dsl.Output[dsl.Markdown],
    metrics: dsl.Output[dsl.Metrics],
):
    """Judges a policy by its scored samples and continues the history of the fine-tune."""
    from pathlib import Path

    from components.common.tracking import log_kfp_metrics
    from components.evaluate.stage import run

    run(
        settings=settings,
        iteration=iteration,
        policy=Path(policy.path),
        scored=Path(scored.path),
        history=Path(history.path),
        evaluation=Path(evaluation.path),
        report=Path(report.path),
        summary=Path(summary.path),
    )
    log_kfp_metrics(metrics, Path(evaluation.path))
