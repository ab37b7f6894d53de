"""Write the Grafana dashboards of serving_panels.py and kernel_panels.py as JSON, with Grafana's own SDK.

    python deploy/monitoring/dashboards.py [DIRECTORY]

They take any Prometheus data source that Grafana has; its instance and model are chosen at the top.
"""

import itertools
import json
import sys
from pathlib import Path

import panels
from grafana_foundation_sdk.builders import common, prometheus, stat, table, timeseries
from grafana_foundation_sdk.builders import dashboard as builders
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common as options
from grafana_foundation_sdk.models import dashboard as models
from grafana_foundation_sdk.models.prometheus import PromQueryFormat
from kernel_panels import KERNELS
from serving_panels import SERVING

SOURCE = models.DataSourceRef(type_val="prometheus", uid="${datasource}")
TAG = "vllm-flute"
DASHBOARDS = (SERVING, KERNELS)
HEIGHTS = {"stat": 4, "lines": 8, "stacked": 8, "table": 8}


def lines(stacked: bool) -> timeseries.Panel:
    legend = common.VizLegendOptions().display_mode(options.LegendDisplayMode.LIST)
    legend = legend.placement(options.LegendPlacement.BOTTOM).show_legend(True)
    panel = timeseries.Panel().legend(legend).min(0).line_width(1)
    panel = panel.tooltip(common.VizTooltipOptions().mode(options.TooltipDisplayMode.MULTI))
    if not stacked:
        return panel.fill_opacity(0)
    return panel.fill_opacity(25).stacking(common.StackingConfig().mode(options.StackingMode.NORMAL))


def numbers() -> stat.Panel:
    last = common.ReduceDataOptions().calcs(["lastNotNull"])
    return stat.Panel().reduce_options(last).graph_mode(options.BigValueGraphMode.AREA)


def labels() -> table.Panel:
    """A series a row: its labels are the columns."""
    hidden = {"Time": True, "__name__": True, "job": True}
    organize = models.DataTransformerConfig(id_val="organize", options={"excludeByName": hidden})
    return table.Panel().with_transformation(organize)


def render(panel: panels.Panel):
    kinds = {"stat": numbers, "table": labels, "lines": lambda: lines(False), "stacked": lambda: lines(True)}
    result = kinds[panel.kind]().title(panel.title).description(panel.description).datasource(SOURCE)
    result = result.unit(panel.unit).span(panel.width).height(HEIGHTS[panel.kind])
    for i, (legend, expr) in enumerate(panel.queries.items()):
        target = prometheus.Dataquery().expr(expr).ref_id(chr(ord("A") + i)).datasource(SOURCE)
        if panel.kind == "table":
            target = target.instant().format(PromQueryFormat.TABLE)
        else:
            target = target.range().legend_format(legend)
        result = result.with_target(target)
    return result


def variable(name: str, label: str, query: str) -> builders.QueryVariable:
    result = builders.QueryVariable(name).label(label).datasource(SOURCE).query(query)
    result = result.refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED).sort(models.VariableSort.ALPHABETICAL_ASC)
    result = result.current(models.VariableOption(selected=True, text="All", value="$__all"))
    return result.multi(True).include_all(True)


def alerts() -> builders.AnnotationQuery:
    """Firing alerts as marks on every panel."""
    expr = f'ALERTS{{alertstate="firing", {panels.INSTANCE}}}'
    return builders.AnnotationQuery().name("Alerts").datasource(SOURCE).enable(True).icon_color("red").expr(expr)


def build(dashboard: panels.Dashboard) -> models.Dashboard:
    result = builders.Dashboard(dashboard.title).uid(dashboard.uid).description(dashboard.description).tags([TAG])
    result = result.time("now-30m", "now").refresh("10s").tooltip(models.DashboardCursorSync.CROSSHAIR).editable()
    others = builders.DashboardLink(TAG).type(models.DashboardLinkType.DASHBOARDS).tags([TAG])
    result = result.link(others.keep_time(True).include_vars(True)).annotation(alerts())
    result = result.with_variable(builders.DatasourceVariable("datasource").label("Prometheus").type("prometheus"))
    result = result.with_variable(variable("model", "Model", "label_values(vllm:num_requests_running, model_name)"))
    servers = 'label_values(vllm:num_requests_running{model_name=~"$model"}, instance)'
    result = result.with_variable(variable("instance", "Server", servers))
    ids = itertools.count(1)
    for title, row in dashboard.rows.items():
        result = result.with_row(builders.Row(title).id(next(ids)))
        for panel in row:
            result = result.with_panel(render(panel).id(next(ids)))
    return result.build()


def main(directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for dashboard in DASHBOARDS:
        text = json.dumps(build(dashboard), cls=JSONEncoder, indent=1, sort_keys=True)
        (directory / f"{dashboard.uid}.json").write_text(text + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if sys.argv[1:] else Path(__file__).parent / "dashboards")
