"""Times that can be compared: interleaved, shuffled rounds, paired ratios, and a twin that tells the noise."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.harness.setting import Setting
from sd_hyena.cost.timing import interleaved, seconds

TWIN = "twin"  # the baseline once more: what it seems to win or lose is noise
LEAST, MOST = 3, 15  # rounds


def quantile(values: Sequence[float], q: float) -> float:
    """Between neighbours by proportion; `q` from 0 to 1."""
    ordered = sorted(values)
    at = q * (len(ordered) - 1)
    low = int(at)
    return ordered[low] + (at - low) * (ordered[min(low + 1, len(ordered) - 1)] - ordered[low])


@dataclass(frozen=True)
class Spread:
    """Median, the band that holds eight of ten, and the mean."""

    median: float
    p10: float
    p90: float
    mean: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.median(values), quantile(values, 0.1), quantile(values, 0.9), statistics.fmean(values))


@dataclass(frozen=True)
class Compared:
    """Of one call: its seconds, how many times faster it is than the baseline in the same round, and the noise of that.

    Without a baseline the last two are missing.
    """

    seconds: Spread
    ratio: Spread | None = None
    noise: float | None = None

    @property
    def verdict(self) -> str:
        """The ratio for people; a difference within the noise is none."""
        if self.ratio is None:
            return ""
        return "about equal" if abs(self.ratio.median - 1) <= self.noise else f"{self.ratio.median:.2f}x"


def compare(
    calls: Mapping[str, Callable[[], object]], against: str, setting: Setting, budget: float, rounds: int = 0
) -> dict[str, Compared]:
    """Every call beside the one named `against`, after a warm-up in as many rounds as fit into `budget` seconds, at
    least three; or in `rounds` of them, the warm-up being the caller's."""
    names = [*calls, TWIN]
    every = [*calls.values(), calls[against]]
    if not rounds:
        cold = sum(seconds(call, setting.device) for call in every)
        rounds = max(LEAST, min(MOST, int(budget / cold)))
    times = dict(zip(names, interleaved(every, rounds, setting.device, random.Random(0)), strict=True))

    def ratios(name: str) -> list[float]:
        return [base / own for base, own in zip(times[against], times[name], strict=True)]

    twin = Spread.of(ratios(TWIN))
    noise = max(abs(twin.p10 - 1), abs(twin.p90 - 1))
    return {name: Compared(Spread.of(times[name]), Spread.of(ratios(name)), noise) for name in names}
