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
from components.evaluate.charts import Chart, duration, number
from components.evaluate.headline import Headline, Rate, headline
from components.evaluate.history import Record
from components.evaluate.panels import curve_panels, largest_k, points, times_panel

_HERE = Path(__file__).parent
_SLOT = re.compile(r"\{\{(\w+)\}\}")
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
    panels, times = curve_panels(report.records), times_panel(report.records)
    iterations = _iterations(report.records)
    shown = [panel for panel in panels if panel.drawn]
    drawn = [charts.payload(panel) for panel in [*shown, times] if panel.drawn]
    data = {"charts": drawn, "samples": list(report.samples)}
    slots = {
        "title": escape(f"{report.fine_tune} after update {report.iteration}"),
        "fine_tune": escape(report.fine_tune),
        "facts": _facts(report),
        "script_hash": f"'sha256-{digest}'",
        "style": style,
        "script": script,
        "hero": _hero(headline(report.records)),
        "tiles": _tiles(report.records),
        "charts": "".join(charts.draw(panel, iterations) for panel in shown),
        "charts_without": _without_values([panel for panel in panels if not panel.drawn]),
        "samples_note": "The best, the worst and some between, of training and held-out prompts.",
        "times": _times(times, iterations),
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


def _iterations(records: Sequence[Record]) -> list[int]:
    return [record.iteration for record in records] or [0]


def _facts(report: Report) -> str:
    last = headline(report.records)
    pairs = {"Run": report.run, "Policy": f"after update {report.iteration}"}
    pairs["Digest"] = report.policy.partition(":")[2][:12]
    if last:
        pairs["Held-out prompts"] = f"{last.num_prompts:,} × {last.samples_a_prompt} samples"
    pairs["Made"] = report.created.replace("T", " ").removesuffix("+00:00") + " UTC"
    return "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in pairs.items())


def _without_values(panels: Sequence[Chart]) -> str:
    if not panels:
        return ""
    return f'<p class="charts-without">Without values so far: {escape(", ".join(one.title for one in panels))}.</p>'


def _hero(result: Headline | None) -> str:
    if result is None:
        nothing = "No held-out prompts were sampled yet."
        return f'<div><h2>pass@1 on held-out prompts</h2><p class="verdict">{nothing}</p></div>'
    shown = f'<span class="after" id="pass-after">{number(result.after.value, "percent")}</span>'
    if not result.is_baseline:
        before = number(result.before.value, "percent")
        arrow = '<span class="arrow" aria-label="to">→</span>'
        shown = f'<span class="before" id="pass-before">{before}</span>{arrow}{shown}'
    rows = [] if result.is_baseline else [_scale_row("before", result.before, "was")]
    rows.append(_scale_row("baseline" if result.is_baseline else "now", result.after, "now"))
    return (
        f'<div><h2>pass@1 on {result.num_prompts:,} held-out prompts</h2><p class="figures">{shown}</p>'
        f'<p class="verdict" id="verdict">{escape(result.sentence)}</p></div>'
        f'<div class="scale">{"".join(rows)}<div class="ends" aria-hidden="true">'
        "<span>0 %</span><span>50 %</span><span>100 %</span></div></div>"
    )


def _scale_row(name: str, rate: Rate, style: str) -> str:
    low, high = rate.low * 100, rate.high * 100
    interval = f"{number(rate.low, 'percent')} to {number(rate.high, 'percent')}"
    spoken = f"{name}: {number(rate.value, 'percent')}, 95 % interval {interval}"
    return (
        f'<div class="row {style}" role="img" aria-label="{escape(spoken)}"><span>{name}</span><div class="track">'
        f'<div class="fill" style="width:{rate.value * 100:.2f}%"></div>'
        f'<div class="interval" style="left:{low:.2f}%;width:{max(high - low, 0.3):.2f}%"></div></div></div>'
    )


def _tiles(records: Sequence[Record]) -> str:
    attempts, votes = largest_k(records, "pass") or 1, largest_k(records, "maj")
    wanted = [(f"pass@{attempts}", f"eval/pass@{attempts}", "percent")] if attempts > 1 else []
    wanted += [(f"maj@{votes}, majority vote", f"eval/maj@{votes}", "percent")] if votes else []
    wanted += [
        ("Reward, training", "reward", "number"),
        ("Groups without signal", "frac_reward_zero_std", "percent"),
        ("Tokens an answer", "eval/completions/mean_length", "tokens"),
        ("Truncated, held-out", "eval/completions/clipped_ratio", "percent"),
    ]
    return "".join(_tile(title, points(records, metric), form) for title, metric, form in wanted)


def _tile(title: str, points: Mapping[int, float], form: str) -> str:
    if not points:
        return ""
    first, last = min(points), max(points)
    was = f"from {number(points[first], form)}" if last > first else f"at update {first}"
    return f'<div class="tile"><h3>{escape(title)}</h3><b>{number(points[last], form)}</b><p>{was}</p></div>'


def _times(panel: Chart, iterations: Sequence[int]) -> str:
    if not panel.drawn:
        return "<p>No stage times were recorded.</p>"
    total = sum(sum(line.points.values()) for line in panel.drawn)
    rows = []
    for position, line in enumerate(panel.drawn):
        spent = sum(line.points.values())
        cells = (
            duration(spent),
            duration(spent / len(line.points)),
            number(spent / total if total else 0.0, "percent"),
        )
        name = f'<span class="key key-{position}"></span>{escape(line.name)}'
        rows.append(f'<tr><th scope="row">{name}</th>' + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    head = "".join(f'<th scope="col">{title}</th>' for title in ("Stage", "Total", "Mean", "Share"))
    foot = f'<th scope="row">All</th><td>{duration(total)}</td><td></td><td></td>'
    return (
        f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody><tfoot><tr>{foot}</tr></tfoot></table>"
        + charts.draw(panel, iterations)
    )


def _table(records: Sequence[Record]) -> str:
    names = sorted({name for record in records for name in record.metrics})
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in names)
    rows = []
    for record in records[-_TABLE_ITERATIONS:]:
        cells = [format(record.metrics[name], ".4g") if name in record.metrics else "–" for name in names]
        rows.append(
            f'<tr><th scope="row">{record.iteration}</th>' + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"
        )
    return (
        '<div class="scroll" tabindex="0" role="region" aria-label="All figures by update"><table>'
        f'<thead><tr><th scope="col">Update</th>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
    )


_DEFINITIONS = {
    "pass@k": "Chance that at least one of k samples is right, estimated without bias from all samples of a prompt "
    "(Chen et al. 2021).",
    "maj@k": "Chance that the most frequent answer among k samples is right; tied answers share the vote.",
    "95 % interval": "Percentile bootstrap over prompts. The gain is paired: the same prompts before and after. When "
    "all prompts have one value the interval has no width.",
    "After update k": "Figures of the policy that has had k updates: its samples, its rewards, and the update that "
    "made it.",
    "Advantage": "(reward − mean of the group) / standard deviation of the group.",
}


def _definitions(report: Report) -> str:
    pairs = {"Right": report.judged_by} | _DEFINITIONS
    parts = (f"<div><dt>{escape(name)}</dt><dd>{escape(text)}</dd></div>" for name, text in pairs.items())
    return f"<dl>{''.join(parts)}</dl>"
