"""The report: one self-contained HTML page, no network, works in the sandboxed frame of the KFP and MLflow UIs.

Text that models or data sets wrote is data here: it travels as JSON in which `<` is escaped and is put on the page as
text nodes. The page's content security policy admits no script but its own (by hash) and no request at all.
"""

import base64
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from components.evaluate import charts
from components.evaluate.charts import Chart, Line, duration, number
from components.evaluate.headline import Headline, Rate, headline
from components.evaluate.history import Record
from components.evaluate.metrics import PASS_AT_1

_HERE = Path(__file__).parent
_SLOT = re.compile(r"\{\{(\w+)\}\}")
STAGES = ("rollout", "reward", "update", "evaluate")
_TABLE_ITERATIONS = 200
"""Rows of the table of all figures: the latest ones."""


@dataclass(frozen=True)
class Report:
    """All a report shows."""

    fine_tune: str
    run: str
    iteration: int
    policy: str
    created: str
    records: Sequence[Record]
    samples: Sequence[Mapping[str, Any]]
    """Rows of the completions list, as `samples.row` makes them."""
    judged_by: str
    """How an answer was found right, in words."""


def render(report: Report) -> str:
    """The page."""
    style, script = (_HERE / "page.css").read_text(), (_HERE / "page.js").read_text()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    panels, times = curve_panels(report.records), _times_panel(report.records)
    iterations = _iterations(report.records)
    data = {"charts": [charts.payload(panel) for panel in [*panels, times] if panel.drawn], "samples": list(report.samples)}
    slots = {
        "title": escape(f"{report.fine_tune} after update {report.iteration}"),
        "fine_tune": escape(report.fine_tune),
        "facts": _facts(report),
        "script_hash": f"'sha256-{digest}'",
        "style": style,
        "script": script,
        "hero": _hero(headline(report.records)),
        "tiles": _tiles(report.records),
        "charts": "".join(charts.draw(panel, iterations) for panel in panels),
        "samples_note": "The best, the worst and some between. Advantage: reward against the mean of its group, in standard deviations.",
        "times": _times(times, report.records, iterations),
        "times_note": "Seconds a stage worked; stages may overlap.",
        "table": _table(report.records),
        "table_size": f"{len(report.records)} update{'s' if len(report.records) != 1 else ''}",
        "definitions": _definitions(report),
        "data": safe_json(data),
    }
    return _SLOT.sub(lambda slot: slots[slot.group(1)], (_HERE / "page.html").read_text())


def safe_json(value: Any) -> str:
    """JSON that cannot end a script element, whatever text is in it."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text.encode("utf-8", "replace").decode()  # lone surrogates cannot be written to a file


def curve_panels(records: Sequence[Record]) -> list[Chart]:
    """The panels of curves: the six of every report, then those that have values."""

    def line(name: str, metric: str) -> Line:
        return Line(name, _points(records, metric))

    largest = max((_pass_k(name) for record in records for name in record.metrics), default=1)
    low, high = _points(records, f"{PASS_AT_1}_low"), _points(records, f"{PASS_AT_1}_high")
    passes = [Line("pass@1", _points(records, PASS_AT_1), low, high)] + ([line(f"pass@{largest}", f"eval/pass@{largest}")] if largest > 1 else [])
    required = [
        Chart("pass", "Solved, held-out prompts", "Share of prompts; the band is the 95 % interval of pass@1.", passes, "percent", 0.0, 1.0),
        Chart("reward", "Reward", "Mean weighted total of the samples.", [line("training", "reward"), line("held-out", "eval/reward")]),
        Chart("length", "Completion length", "Mean, in tokens.", [line("training", "completions/mean_length"), line("held-out", "eval/completions/mean_length")], "tokens"),
        Chart("kl", "KL to the start policy", "Estimated on training samples, in nats a token; only there when a KL coefficient is set.", [line("KL", "kl")]),
        Chart("entropy", "Entropy", "Of the next token, in nats; a fall to zero means exploration has ended.", [line("entropy", "entropy")]),
        Chart("clip", "Clipped tokens", "Share of tokens whose probability ratio left the trust region.", [line("all", "clip_ratio/region_mean"), line("above", "clip_ratio/high_mean"), line("below", "clip_ratio/low_mean")], "percent"),
    ]  # fmt: skip
    more = [
        Chart("signal", "Groups without signal", "Share of training groups whose samples all got the same reward.", [line("no signal", "frac_reward_zero_std")], "percent", 0.0, 1.0),
        Chart("truncated", "Truncated completions", "Share that reached the length limit.", [line("training", "completions/clipped_ratio"), line("held-out", "eval/completions/clipped_ratio")], "percent"),
        Chart("mismatch", "Generator against trainer", "Mean difference of log-probabilities for the same tokens, in nats.", [line("difference", "sampling/sampling_logp_difference/mean")]),
    ]  # fmt: skip
    return required + [panel for panel in more if panel.drawn]


def _pass_k(name: str) -> int:
    found = re.fullmatch(r"eval/pass@(\d+)", name)
    return int(found.group(1)) if found else 1


def _points(records: Sequence[Record], metric: str) -> dict[int, float]:
    return {record.iteration: record.metrics[metric] for record in records if metric in record.metrics}


def _iterations(records: Sequence[Record]) -> list[int]:
    return [record.iteration for record in records] or [0]


def _facts(report: Report) -> str:
    last = headline(report.records)
    pairs = [("Run", report.run), ("Policy", f"after update {report.iteration}"), ("Digest", report.policy.partition(":")[2][:12] or report.policy)]
    if last:
        pairs.append(("Held-out prompts", f"{last.num_prompts:,} × {last.samples_a_prompt} samples"))
    pairs.append(("Made", report.created.replace("T", " ").removesuffix("Z").removesuffix("+00:00") + " UTC"))
    return "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in pairs)


def _hero(result: Headline | None) -> str:
    if result is None:
        return '<div><h2>pass@1 on held-out prompts</h2><p class="verdict">No held-out prompts were sampled yet.</p></div>'
    shown = f'<span class="after" id="pass-after">{number(result.after.value, "percent")}</span>'
    if not result.is_baseline:
        before = number(result.before.value, "percent")
        shown = f'<span class="before" id="pass-before">{before}</span><span class="arrow" aria-label="to">→</span>{shown}'
    rows = [] if result.is_baseline else [_scale_row("before", result.before, "was")]
    rows.append(_scale_row("baseline" if result.is_baseline else "now", result.after, "now"))
    return (
        f'<div><h2>pass@1 on {result.num_prompts:,} held-out prompts</h2><p class="figures">{shown}</p>'
        f'<p class="verdict" id="verdict">{escape(result.sentence)}</p></div>'
        f'<div class="scale">{"".join(rows)}<div class="ends" aria-hidden="true"><span>0 %</span><span>50 %</span><span>100 %</span></div></div>'
    )


def _scale_row(name: str, rate: Rate, style: str) -> str:
    low, high = rate.low * 100, rate.high * 100
    spoken = f"{name}: {number(rate.value, 'percent')}, 95 % interval {number(rate.low, 'percent')} to {number(rate.high, 'percent')}"
    return (
        f'<div class="row {style}" role="img" aria-label="{escape(spoken)}"><span>{name}</span><div class="track">'
        f'<div class="fill" style="width:{rate.value * 100:.2f}%"></div>'
        f'<div class="interval" style="left:{low:.2f}%;width:{max(high - low, 0.3):.2f}%"></div></div></div>'
    )


def _tiles(records: Sequence[Record]) -> str:
    largest = max((_pass_k(name) for record in records for name in record.metrics), default=1)
    votes = sorted({int(name.rsplit("@", 1)[1]) for r in records for name in r.metrics if re.fullmatch(r"eval/maj@\d+", name)})
    wanted = [(f"pass@{largest}", f"eval/pass@{largest}", "percent")] if largest > 1 else []
    wanted += [(f"maj@{votes[-1]}, majority vote", f"eval/maj@{votes[-1]}", "percent")] if votes else []
    wanted += [
        ("Reward, training", "reward", "number"),
        ("Groups without signal", "frac_reward_zero_std", "percent"),
        ("Tokens an answer", "eval/completions/mean_length", "tokens"),
        ("Truncated, held-out", "eval/completions/clipped_ratio", "percent"),
    ]
    return "".join(_tile(title, _points(records, metric), form) for title, metric, form in wanted)


def _tile(title: str, points: Mapping[int, float], form: str) -> str:
    if not points:
        return ""
    first, last = min(points), max(points)
    was = f"from {number(points[first], form)}" if last > first else f"at update {first}"
    return f'<div class="tile"><h3>{escape(title)}</h3><b>{number(points[last], form)}</b><p>{was}</p></div>'


def _times_panel(records: Sequence[Record]) -> Chart:
    names = [*STAGES, *sorted({name for record in records for name in record.seconds} - set(STAGES))]
    lines = [Line(name, {r.iteration: r.seconds[name] for r in records if name in r.seconds}) for name in names]
    return Chart("times", "Seconds by update", "", [line for line in lines if line.points], "seconds", stacked=True)


def _times(panel: Chart, records: Sequence[Record], iterations: Sequence[int]) -> str:
    if not panel.drawn:
        return "<p>No stage times were recorded.</p>"
    total = sum(sum(line.points.values()) for line in panel.drawn)
    rows = []
    for position, line in enumerate(panel.drawn):
        spent = sum(line.points.values())
        rows.append(
            f'<tr><th scope="row"><span class="key key-{position}"></span>{escape(line.name)}</th><td>{duration(spent)}</td>'
            f"<td>{duration(spent / len(line.points))}</td><td>{number(spent / total if total else 0.0, 'percent')}</td></tr>"
        )
    return (
        f'<table><thead><tr><th scope="col">Stage</th><th scope="col">Total</th><th scope="col">Mean</th><th scope="col">Share</th></tr></thead>'
        f'<tbody>{"".join(rows)}</tbody><tfoot><tr><th scope="row">All</th><td>{duration(total)}</td><td></td><td></td></tr></tfoot></table>'
        + charts.draw(panel, iterations)
    )


def _table(records: Sequence[Record]) -> str:
    names = sorted({name for record in records for name in record.metrics})
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in names)
    rows = []
    for record in records[-_TABLE_ITERATIONS:]:
        cells = "".join(f"<td>{number(record.metrics[name]) if name in record.metrics else '–'}</td>" for name in names)
        rows.append(f'<tr><th scope="row">{record.iteration}</th>{cells}</tr>')
    return (
        '<div class="scroll" tabindex="0" role="region" aria-label="All figures by update"><table>'
        f'<thead><tr><th scope="col">Update</th>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
    )


def _definitions(report: Report) -> str:
    pairs = [
        ("Right", report.judged_by),
        ("pass@k", "Chance that at least one of k samples is right, estimated without bias from all samples of a prompt (Chen et al. 2021)."),
        ("maj@k", "Chance that the most frequent answer among k samples is right; tied answers share the vote."),
        ("95 % interval", "Percentile bootstrap over prompts. The gain is paired: the same prompts before and after. When all prompts have one value the interval has no width."),
        ("After update k", "Figures of the policy that has had k updates: its samples, its rewards, and the update that made it."),
        ("Advantage", "(reward − mean of the group) / standard deviation of the group."),
    ]  # fmt: skip
    return "<dl>" + "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(text)}</dd></div>" for name, text in pairs) + "</dl>"
