"""The decision in Markdown, for the KFP UI and the console."""

from typing import Any


def markdown(fine_tune: str, outcome: dict[str, Any]) -> str:
    """Verdict, reason, and the two policies side by side."""
    metric = outcome["rule"]["metric"]
    lines = [f"# {fine_tune}: {'accepted' if outcome['accepted'] else 'rejected'}", "", outcome["reason"], ""]
    lines += [f"| | Update | Run | {metric} | 95 % interval | Digest |", "|---|---:|---|---:|---:|---|"]
    lines += [_row(contender) for contender in (outcome["candidate"], outcome["rival"]) if contender]
    if outcome.get("mlflow") and outcome["mlflow"].get("model_version"):
        whose = "This policy" if outcome["accepted"] else "The champion"
        lines += ["", f"{whose} is version {outcome['mlflow']['model_version']} in the model registry."]
    return "\n".join(lines) + "\n"


def _row(contender: dict[str, Any]) -> str:
    interval = "" if contender["low"] is None else f"{contender['low']:.4f} to {contender['high']:.4f}"
    digest = contender["digest"].partition(":")[2][:12]
    return (
        f"| {contender['role']} | {contender['iteration']} | {contender['run']} "
        f"| {contender['value']:.4f} | {interval} | `{digest}` |"
    )
