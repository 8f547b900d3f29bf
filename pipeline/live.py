"""What a local run shows while it goes on: a live view on a terminal, a line a stage elsewhere."""

import time
from collections.abc import Mapping
from typing import Any, Self

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from pipeline.progress import Progress, iteration_table


class Watcher:
    """Takes a run's events again and again and shows what is new."""

    def __init__(self, console: Console, title: str, *, iterations: int, earlier: int = 0) -> None:
        """`earlier`: how many events there are from earlier tries of a run that is resumed."""
        self.console = console
        self.title = title
        self.iterations = iterations
        self.started = time.monotonic()
        self.earlier = self.shown = earlier
        self.kept: list[str] = []
        self.live = Live(console=console, refresh_per_second=4, transient=True) if console.is_terminal else None

    def __enter__(self) -> Self:
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live:
            self.live.stop()

    def __call__(self, events: list[dict[str, Any]]) -> None:
        if self.live:
            progress = Progress.of(events, iterations=self.iterations, since=self.earlier)
            self.live.update(self._view(progress))
        else:
            for event in events[self.shown :]:
                self._line(event)
        self.shown = len(events)

    def _view(self, progress: Progress) -> Group:
        elapsed = _clock(time.monotonic() - self.started)
        head = Text.assemble(
            (self.title, "bold"), f"   iteration {progress.iteration} of {progress.last_iteration}   {elapsed}"
        )
        stages = [Text(f"  {task.label}  {_clock(task.seconds)}  {task.detail}") for task in progress.running]
        table = iteration_table(progress.records, tail=12)
        return Group(head, *(stages or [Text("  starting the next stage …", style="dim")]), table)

    def _line(self, event: Mapping[str, Any]) -> None:
        kind, task, clock = event["event"], event["task"], _clock(time.monotonic() - self.started)
        if kind == "skipped":
            self.kept.append(task)
            return
        if self.kept:
            what = f"{len(self.kept)} stages, up to {self.kept[-1]}" if len(self.kept) > 1 else self.kept[0]
            self.console.print(f"{clock}  kept from before: {what}", soft_wrap=True)
            self.kept.clear()
        if kind == "done":
            figures = "  ".join(f"{name} {value:.4g}" for name, value in _headline(event).items())
            self.console.print(f"{clock}  {task:<20} {event['seconds']:6.1f} s  {figures}", soft_wrap=True)
        elif kind == "failed":
            self.console.print(f"{clock}  {task:<20}  failed", style="red")


HEADLINES = {
    "rollout": ("rollout/num_completions", "rollout/tokens_per_second"),
    "reward": ("reward", "frac_reward_zero_std"),
    "update": ("loss", "grad_norm", "entropy"),
    "evaluate": ("eval/pass@1",),
}


def _headline(event: Mapping[str, Any]) -> dict[str, float]:
    metrics = event.get("metrics", {})
    shown = {name: metrics[name] for name in HEADLINES.get(event["stage"], ()) if name in metrics}
    errors = {name: metrics[name] for name in ("reward/errors", "eval/reward/errors") if metrics.get(name)}
    return shown | (errors if event["stage"] == "reward" else {})


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes:d}:{rest:02d}"
