"""The README's picture of the pipeline, drawn from the graph that is really compiled.

Boxes are the tasks of a run of two iterations, columns their depth in the graph, arrows the artifacts between them.
"""

from collections.abc import Mapping
from html import escape
from typing import Any

WIDTH, HEIGHT, GAP_X, GAP_Y, MARGIN, TOP = 118, 52, 34, 30, 24, 74
POOLS = {
    "rollout": ("GPU · vLLM", "gpu"),
    "update": ("GPU · DeepSpeed", "gpu"),
    "reward": ("CPU · sandbox", "cpu"),
    "publish": ("CPU · MLflow", "cpu"),
}
STYLE = """
text{font:13px system-ui,sans-serif;fill:#1f2328}.small{font-size:10.5px;fill:#59636e}.title{font-weight:600}
.cpu{fill:#eef4fb;stroke:#4b7bb5}.gpu{fill:#fdf1e3;stroke:#c07a1b}.band{fill:none;stroke:#a8b0b9;stroke-dasharray:5 5}
.arrow{fill:none;stroke:#6b7580;stroke-width:1.3}.head{fill:#6b7580}.store{fill:#eaf5ec;stroke:#3f8f52}
@media(prefers-color-scheme:dark){text{fill:#e6edf3}.small{fill:#9da7b1}.cpu{fill:#14253a}.gpu{fill:#3a2810}
.store{fill:#12301a}.arrow{stroke:#8b949e}.head{fill:#8b949e}.band{stroke:#586069}}
"""


def draw(ir: Mapping[str, Any]) -> str:
    """SVG of a compiled pipeline's root graph."""
    tasks = ir["root"]["dag"]["tasks"]
    parents = {name: _parents(task) for name, task in tasks.items()}
    label = {name: task["taskInfo"]["name"] for name, task in tasks.items()}
    place = _places(parents, label)
    columns = max(column for column, _ in place.values()) + 1
    width = 2 * MARGIN + columns * (WIDTH + GAP_X) - GAP_X
    height = TOP + 2 * (HEIGHT + GAP_Y) + 96
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
        'aria-label="The stages of a run and the artifacts between them">',
        f"<style>{STYLE}</style>",
        '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path class="head" d="M0 0L8 4L0 8z"/></marker></defs>',
        *_bands(place, label),
        *(_arrow(place[source], place[name]) for name in sorted(tasks) for source in sorted(_direct(parents, name))),
        *(_box(place[name], label[name]) for name in sorted(tasks)),
        *_store(width, height),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _parents(task: Mapping[str, Any]) -> set[str]:
    inputs = task.get("inputs", {})
    artifacts = inputs.get("artifacts", {}).values()
    return {found["taskOutputArtifact"]["producerTask"] for found in artifacts if "taskOutputArtifact" in found}


def _direct(parents: Mapping[str, set[str]], name: str) -> set[str]:
    """Parents that are not reached through another parent: the arrows worth drawing."""
    behind: set[str] = set()
    for parent in parents[name]:
        pending = list(parents[parent])
        while pending:
            ancestor = pending.pop()
            if ancestor not in behind:
                behind.add(ancestor)
                pending.extend(parents[ancestor])
    return parents[name] - behind


def _places(parents: Mapping[str, set[str]], label: Mapping[str, str]) -> dict[str, tuple[int, int]]:
    depth: dict[str, int] = {}

    def of(name: str) -> int:
        if name not in depth:
            depth[name] = max((of(parent) + 1 for parent in parents[name]), default=0)
        return depth[name]

    names = sorted(sorted(parents), key=of)
    place: dict[str, tuple[int, int]] = {}
    for name in names:
        second_row = label[name].startswith("evaluate")
        place[name] = (of(name), int(second_row))
    return place


def _corner(place: tuple[int, int]) -> tuple[int, int]:
    column, row = place
    return MARGIN + column * (WIDTH + GAP_X), TOP + row * (HEIGHT + GAP_Y)


def _box(place: tuple[int, int], label: str) -> str:
    x, y = _corner(place)
    stage = label.split()[0]
    pool, kind = POOLS.get(stage, ("CPU", "cpu"))
    return (
        f'<rect class="{kind}" x="{x}" y="{y}" width="{WIDTH}" height="{HEIGHT}" rx="8"/>'
        f'<text class="title" x="{x + WIDTH / 2}" y="{y + 22}" text-anchor="middle">{escape(stage)}</text>'
        f'<text class="small" x="{x + WIDTH / 2}" y="{y + 39}" text-anchor="middle">{escape(pool)}</text>'
    )


def _arrow(source: tuple[int, int], target: tuple[int, int]) -> str:
    x1, y1 = _corner(source)
    x2, y2 = _corner(target)
    start, end = (x1 + WIDTH, y1 + HEIGHT / 2), (x2 - 2, y2 + HEIGHT / 2)
    middle = start[0] + GAP_X / 2
    return (
        f'<path class="arrow" marker-end="url(#head)" d="M{start[0]} {start[1]} C{middle} {start[1]} '
        f'{end[0] - GAP_X / 2} {end[1]} {end[0]} {end[1]}"/>'
    )


def _bands(place: Mapping[str, tuple[int, int]], label: Mapping[str, str]) -> list[str]:
    """A dashed frame around each iteration."""
    iterations: dict[str, list[int]] = {}
    for name, (column, _) in sorted(place.items()):
        _, _, number = label[name].partition(" ")
        if number:
            iterations.setdefault(number, []).append(column)
    frames = []
    last = max(iterations, key=int)
    for number, columns in iterations.items():
        x, _ = _corner((min(columns), 0))
        width = (max(columns) - min(columns) + 1) * (WIDTH + GAP_X) - GAP_X
        text = "final policy" if number == last else f"iteration {int(number) + 1}"
        frames.append(
            f'<rect class="band" x="{x - 10}" y="{TOP - 16}" width="{width + 20}" '
            f'height="{2 * HEIGHT + GAP_Y + 32}" rx="12"/>'
            f'<text class="small" x="{x - 2}" y="{TOP - 24}">{text}</text>'
        )
    return frames


def _store(width: int, height: int) -> list[str]:
    y = height - 62
    return [
        f'<rect class="store" x="{MARGIN}" y="{y}" width="{width - 2 * MARGIN}" height="40" rx="8"/>',
        f'<text x="{width / 2}" y="{y + 25}" text-anchor="middle"><tspan class="title">object storage</tspan>'
        "  content-addressed blobs; every arrow is a manifest of a few KB, the bytes move beside Kubeflow</text>",
    ]
