"""Histogram of values that come many at a time."""

from __future__ import annotations

import bisect
import itertools
import threading
from collections.abc import Iterator, Sequence

from prometheus_client.core import HistogramMetricFamily
from prometheus_client.utils import floatToGoString


class BatchHistogram:
    """Histogram in which equal values are counted at once.

    The rows of a step have the same time since their last tokens, in most steps all of them. To observe 128 of them one by one
    would cost the engine's thread 0.11 ms a step; all of `Metrics.updated` takes 0.04.

    Args:
        name: Name of the family.
        text: Help text.
        buckets: Upper bounds, ascending, without infinity.
    """

    def __init__(self, name: str, text: str, buckets: Sequence[float]):
        self._name, self._text = name, text
        self._bounds = tuple(buckets)
        self._labels = [*map(floatToGoString, buckets), "+Inf"]
        self._counts = [0] * (len(buckets) + 1)
        self._sum = 0.0
        self._lock = threading.Lock()

    def observe(self, value: float, times: int = 1) -> None:
        """Count `times` observations of one value."""
        with self._lock:
            self._counts[bisect.bisect_left(self._bounds, value)] += times
            self._sum += value * times

    def collect(self) -> Iterator[HistogramMetricFamily]:
        with self._lock:
            counts, total = list(itertools.accumulate(self._counts)), self._sum
        family = HistogramMetricFamily(self._name, self._text)
        family.add_metric((), list(zip(self._labels, map(float, counts))), total)
        yield family
