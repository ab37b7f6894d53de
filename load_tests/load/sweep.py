"""The knee: the highest arrival rate that a server still bears."""

from collections.abc import Callable

GOOD_SHARE = 0.95


def bears(point: dict) -> bool:
    """Nothing failed or was lost, and 95% of the requests were within the SLO."""
    return not point["failed"] and not point["lost"] and (point["good_share"] or 0) >= GOOD_SHARE


def find_knee(
    measure: Callable[[float], dict], start: float, refine: int = 3, doublings: int = 12
) -> tuple[float, list[dict]]:
    """Double the rate until it is not borne (or halve it until it is), then bisect ``refine`` times.

    Args:
        measure: rate in requests per second to a summary (records.summary).

    Returns (the highest rate seen that is borne, 0.0 for none; all summaries with their "rate", by rate).
    """
    points: dict[float, dict] = {}

    def borne(rate: float) -> bool:
        points[rate] = measure(rate) | {"rate": rate}
        return bears(points[rate])

    low = high = start
    if borne(start):
        while len(points) <= doublings and borne(high := low * 2):
            low = high
    else:
        low = start / 2
        while len(points) <= doublings and not borne(low):
            low, high = low / 2, low
    for _ in range(refine):
        middle = (low * high) ** 0.5
        if low in points and bears(points[low]) and not bears(points[high]):
            low, high = (middle, high) if borne(middle) else (low, middle)
    good = [rate for rate, point in points.items() if bears(point)]
    return max(good, default=0.0), [points[rate] for rate in sorted(points)]
