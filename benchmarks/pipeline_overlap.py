"""What pipelined rollouts (staleness 1) gain: a discrete-event simulation of a run's GPU stages. No GPU, no cluster.

    python benchmarks/pipeline_overlap.py [--update 120] [--rollout-start 45] [--update-start 60] [--reward 15]

Stage times are inputs, in seconds: put in those of your own run (`grpo show RUN`). Each iteration's sampling is
`ratio` x `--update` seconds of one GPU, split over the shards (with `--per-shard`: so many seconds on each, more
samples with more shards); a shard's share varies by a log-normal factor, and reward waits for the slowest. A start
(pod, image, policy transfer, engine) holds its GPU and is paid by every task. Rollouts and updates have GPUs of their
own: one a shard, and `--update-gpus`. The dependencies are the pipeline's:

    rollout i  needs the policy after update i - 1 - staleness
    reward i   needs every shard of rollout i
    update i   needs reward i and update i - 1

Printed: seconds an iteration, how much faster staleness 1 is, and the share of GPU time in which neither pool samples
nor trains. In the long run an iteration takes max(R, U, (R + w + U) / 2) with staleness 1 and R + w + U without,
where R and U include their starts; the first iterations fill the pipeline.
"""

import argparse
import heapq
import itertools
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field

RATIOS = (1 / 4, 1 / 2, 1, 2, 4)
SHARDS = (1, 2, 4, 8, 16)


@dataclass(frozen=True)
class Times:
    """Durations in seconds; `rollout` is the sampling of one iteration on one GPU."""

    rollout: float
    update: float
    reward: float = 0.0
    rollout_start: float = 0.0
    update_start: float = 0.0
    reward_start: float = 0.0
    spread: float = 0.0
    """Standard deviation of the logarithm of a shard's duration."""


@dataclass
class Simulation:
    """A run of `iterations` on `shards` rollout GPUs and `update_gpus` others; events in a queue by time."""

    times: Times
    shards: int
    staleness: int
    iterations: int
    update_gpus: int = 1
    seed: int = 0
    now: float = 0.0
    busy: float = 0.0
    """GPU seconds spent sampling or training so far."""
    finished_at: list[float] = field(default_factory=list)
    """End of each update."""

    def __post_init__(self) -> None:
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._random = random.Random(self.seed)
        self._gpu_free = [True] * self.shards
        self._waiting: list[list[int]] = [[] for _ in range(self.shards)]
        self._sampled = [0] * self.iterations
        self._rewarded: set[int] = set()
        self._updating = False
        self._started = 0

    def run(self) -> "Simulation":
        """Plays every event."""
        self._release_rollouts()
        while self._events:
            self.now, _, action = heapq.heappop(self._events)
            action()
        assert len(self.finished_at) == self.iterations
        return self

    @property
    def idle_share(self) -> float:
        """Share of all GPU time, over both pools, without sampling or training."""
        return 1 - self.busy / (self.now * (self.shards + self.update_gpus))

    def _after(self, seconds: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._events, (self.now + seconds, next(self._order), action))

    def _release_rollouts(self) -> None:
        """Rollouts whose policy is there join the queues of their GPUs."""
        while self._started < min(self.iterations, len(self.finished_at) + 1 + self.staleness):
            for shard in range(self.shards):
                self._waiting[shard].append(self._started)
                self._sample(shard)
            self._started += 1

    def _sample(self, shard: int) -> None:
        if not self._gpu_free[shard] or not self._waiting[shard]:
            return
        iteration = self._waiting[shard].pop(0)
        self._gpu_free[shard] = False
        factor = math.exp(self._random.gauss(0, self.times.spread) - self.times.spread**2 / 2)  # of mean one
        seconds = self.times.rollout / self.shards * factor
        self.busy += seconds
        self._after(self.times.rollout_start + seconds, lambda: self._shard_done(shard, iteration))

    def _shard_done(self, shard: int, iteration: int) -> None:
        self._gpu_free[shard] = True
        self._sampled[iteration] += 1
        if self._sampled[iteration] == self.shards:
            self._after(self.times.reward_start + self.times.reward, lambda: self._reward_done(iteration))
        self._sample(shard)

    def _reward_done(self, iteration: int) -> None:
        self._rewarded.add(iteration)
        self._update()

    def _update(self) -> None:
        if self._updating or len(self.finished_at) not in self._rewarded:
            return
        self._updating = True
        self.busy += self.times.update * self.update_gpus
        self._after(self.times.update_start + self.times.update, self._update_done)

    def _update_done(self) -> None:
        self._updating = False
        self._rewarded.discard(len(self.finished_at))
        self.finished_at.append(self.now)
        self._release_rollouts()
        self._update()


def ratio_name(ratio: float) -> str:
    """As people write it: 1:4 … 4:1."""
    return f"1:{round(1 / ratio)}" if ratio < 1 else f"{round(ratio)}:1"


def main() -> None:
    """Prints one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--update", type=float, default=120)
    parser.add_argument("--update-gpus", type=int, default=1, help="1: idle shares of one GPU against the shards'")
    parser.add_argument("--reward", type=float, default=10)
    parser.add_argument("--rollout-start", type=float, default=45)
    parser.add_argument("--update-start", type=float, default=60)
    parser.add_argument("--reward-start", type=float, default=15)
    parser.add_argument("--spread", type=float, default=0.15)
    parser.add_argument("--iterations", type=int, default=50)
    parser.add_argument("--per-shard", action="store_true", help="the ratio is of one shard's time to the update's")
    arguments = parser.parse_args()
    print("| rollout:update | shards | s an iteration, staleness 0 | staleness 1 | faster | idle, 0 | idle, 1 |")
    print("|---:|---:|---:|---:|---:|---:|---:|")
    for ratio, shards in itertools.product(RATIOS, SHARDS):
        times = Times(
            rollout=ratio * arguments.update * (shards if arguments.per_shard else 1), update=arguments.update,
            reward=arguments.reward, rollout_start=arguments.rollout_start, update_start=arguments.update_start,
            reward_start=arguments.reward_start, spread=arguments.spread,
        )  # fmt: skip
        plain, stale = (
            Simulation(times, shards, staleness, arguments.iterations, arguments.update_gpus).run()
            for staleness in (0, 1)
        )
        seconds = [run.now / arguments.iterations for run in (plain, stale)]
        print(
            f"| {ratio_name(ratio)} | {shards} | {seconds[0]:.0f} | {seconds[1]:.0f} | {seconds[0] / seconds[1]:.2f}x "
            f"| {plain.idle_share:.0%} | {stale.idle_share:.0%} |"
        )


if __name__ == "__main__":
    main()
