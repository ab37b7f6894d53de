"""What a dashboard shows, and the forms that its queries have. dashboards.py turns it into Grafana's JSON.

Units are Grafana's identifiers. Queries use Grafana's variables: $model, $instance and $__rate_interval. The plugin's
metrics have no label of the model: their instance is that of the model's server.
"""

from typing import NamedTuple

MODEL = 'instance=~"$instance", model_name=~"$model"'
INSTANCE = 'instance=~"$instance"'


class Panel(NamedTuple):
    """One panel.

    kind: "stat", "lines", "stacked" (lines) or "table"; queries: PromQL by Grafana's template of the series' name;
    width: of 24 columns.
    """

    title: str
    description: str
    unit: str
    queries: dict[str, str]
    kind: str = "lines"
    width: int = 8


class Dashboard(NamedTuple):
    uid: str
    title: str
    description: str
    rows: dict[str, list[Panel]]


def rate(metric: str, labels: str = MODEL, by: str = "instance") -> str:
    return f"sum by ({by}) (rate({metric}{{{labels}}}[$__rate_interval]))"


def quantile(q: float, metric: str) -> str:
    return f"histogram_quantile({q}, {rate(f'{metric}_bucket', by='instance, le')})"


def mean(metric: str) -> str:
    return f"{rate(f'{metric}_sum')} / {rate(f'{metric}_count')}"


def percentiles(metric: str) -> dict[str, str]:
    return {f"{{{{instance}}}} p{q * 100:.0f}": quantile(q, metric) for q in (0.5, 0.95, 0.99)}


def share(part: str, whole: str) -> str:
    """A share that is 0, not missing, where there is none of the part."""
    return f"({part} or 0 * {whole}) / {whole}"
