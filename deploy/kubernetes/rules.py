"""Write the Prometheus operator's PrometheusRule from deploy/monitoring's recording and alert rules.

python deploy/kubernetes/rules.py
"""

from pathlib import Path

import yaml

DEPLOY = Path(__file__).resolve().parent.parent
OUT = DEPLOY / "kubernetes" / "components" / "monitoring" / "prometheusrule.yaml"


def render() -> str:
    groups = [
        group
        for name in ("recording.yml", "alerts.yml")
        for group in yaml.safe_load((DEPLOY / "monitoring" / name).read_text())["groups"]
    ]
    rule = {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "vllm-flute"},
        "spec": {"groups": groups},
    }
    text = yaml.safe_dump(rule, sort_keys=False, width=1000)
    return f"# Written by deploy/kubernetes/rules.py from deploy/monitoring.\n{text}"


if __name__ == "__main__":
    OUT.write_text(render())
    print(OUT)
