from __future__ import annotations

import json
import re
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from chameleon_jax.serving.telemetry.metrics import Metrics
from tests.serving.telemetry.engine_stats import engine_stats

DASHBOARD = json.loads((Path(__file__).parents[3] / "docs" / "grafana" / "chameleon-jax.json").read_text())
SUFFIXES = {"histogram": ("_bucket", "_sum", "_count"), "counter": ("_total",), "gauge": ("",)}


def exported() -> set[str]:
    """Names of the series under this project's own prefix."""
    metrics = Metrics()
    text = metrics.render(engine_stats(["a"])).decode()
    metrics.close()
    own = [f for f in text_string_to_metric_families(text) if f.name.startswith("chameleon:")]
    return {f.name + suffix for f in own for suffix in SUFFIXES[f.type]}


def queried() -> set[str]:
    """Names of the series that panels and variables query."""
    expressions = [target["expr"] for panel in DASHBOARD["panels"] for target in panel.get("targets", ())]
    expressions += [variable["query"] for variable in DASHBOARD["templating"]["list"]]
    return {name for expression in expressions for name in re.findall(r"chameleon:\w+", expression)}


def test_every_queried_metric_is_exported():
    assert len(queried()) > 20
    assert queried() <= exported()


def test_every_exported_metric_is_queried():
    def family(series: str) -> str:
        return re.sub(r"_(bucket|sum|count)$", "", series)

    assert {family(series) for series in exported()} == {family(series) for series in queried()}


def test_panels_do_not_overlap():
    cells = [
        (x, y)
        for panel in DASHBOARD["panels"]
        for at in [panel["gridPos"]]
        for x in range(at["x"], at["x"] + at["w"])
        for y in range(at["y"], at["y"] + at["h"])
    ]
    assert len(cells) == len(set(cells)) and max(x for x, _ in cells) < 24
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
