"""Weighted k-means of numbers, exact: dynamic programming over a histogram."""

import numpy as np

# Bins of the histogram. At 16 clusters over the range of a Gaussian's samples a bin is a thirtieth of the distance
# between neighbouring centres, and what lies in a bin is represented by its own mean.
_BINS = 512


def cluster(values: np.ndarray, weights: np.ndarray, count: int) -> np.ndarray:
    """The ``count`` ascending centres that minimize ``sum(weights * (values - nearest centre)**2)``.

    Clusters of numbers are intervals, so the best ``m`` clusters of the first ``j`` points are the best ``m - 1`` of
    some first ``i`` and one more: H. Wang and M. Song, "Ckmeans.1d.dp: Optimal k-means Clustering in One Dimension by
    Dynamic Programming", The R Journal 3(2), 2011. Exact for the histogram's bins.

    Args:
        values, weights: float64 ``[P]``; weights of at least 0.

    Returns float64 ``[count]``; fewer distinct points than ``count`` repeat the last.
    """
    low, high = values.min(), values.max()
    bins = np.minimum((values - low) * (_BINS / (high - low or 1.0)), _BINS - 1).astype(np.int64)
    mass = np.bincount(bins, weights, _BINS)
    first, second = (np.bincount(bins, weights * values**power, _BINS) for power in (1, 2))
    kept = mass > 0
    sums = [np.concatenate([[0.0], part[kept].cumsum()]) for part in (mass, first, second)]
    m, f, s = (part[None, :] - part[:, None] for part in sums)  # of points i .. j-1, for i < j
    with np.errstate(divide="ignore", invalid="ignore"):
        cost = np.where(m > 0, s - f * f / m, np.inf)
    points = int(kept.sum())
    clusters = min(count, points)
    best, start = cost[0], np.zeros((clusters, points + 1), dtype=np.int64)
    for level in range(1, clusters):
        total = best[:, None] + cost
        start[level] = total.argmin(0)
        best = total.min(0)
    edges = [points]
    for level in range(clusters - 1, -1, -1):
        edges.append(int(start[level, edges[-1]]))
    centres = np.array([f[i, j] / m[i, j] for j, i in zip(edges, edges[1:], strict=False)])[::-1]
    return np.concatenate([centres, np.full(count - clusters, centres[-1])])
