"""Clusters of request sizes, which set where one queue ends and the next begins (paper, section 4.2)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.cluster import vq

MAX_LEVELS = 4
ELBOW_SHARE = 0.05
"""Share of the sizes' total variation that one more cluster must remove."""


def cluster_bounds(sizes: Sequence[float], max_levels: int = MAX_LEVELS) -> list[float]:
    """Sizes at which levels part: midpoints between the centroids of K-means, at most `max_levels` - 1, ascending.

    K is chosen by an elbow rule. (The paper takes the K of least within-cluster variation, which is always the largest.)
    """
    values = np.asarray(sizes, np.float64)
    if len(values) < 2 or values.max() == values.min():
        return []
    centroids = [np.array([values.mean()])]
    for k in range(2, max_levels + 1):
        start = np.unique(np.quantile(values, (np.arange(k) + 0.5) / k))
        if len(start) < k:  # most sizes are equal
            start = np.linspace(values.min(), values.max(), k)
        centroids.append(np.sort(vq.kmeans(values, start)[0]))
    variation = [float((np.abs(values[:, None] - c).min(axis=1) ** 2).sum()) for c in centroids]
    best = centroids[0]
    for k in range(1, len(centroids)):
        if variation[k - 1] - variation[k] < ELBOW_SHARE * variation[0]:
            break
        best = centroids[k]
    return [float(bound) for bound in (best[1:] + best[:-1]) / 2]


def equal_bounds(sizes: Sequence[float], levels: int = MAX_LEVELS) -> list[float]:
    """Bounds of levels of equal width between the smallest and the largest size."""
    low, high = min(sizes, default=0.0), max(sizes, default=0.0)
    return [low + (high - low) * i / levels for i in range(1, levels)] if high > low else []


def distributions_differ(before: Sequence[float], now: Sequence[float], critical: float = 1.95) -> bool:
    """Two-sample Kolmogorov-Smirnov test; with `critical` 1.95, equal distributions differ with a probability of 0.001."""
    if not before or not now:
        return bool(before) != bool(now)
    a, b = np.sort(before), np.sort(now)
    points = np.concatenate([a, b])
    gap = np.abs(np.searchsorted(a, points, "right") / len(a) - np.searchsorted(b, points, "right") / len(b)).max()
    return bool(gap > critical * np.sqrt((len(a) + len(b)) / (len(a) * len(b))))
