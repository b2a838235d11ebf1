"""The Grafana dashboard and the alerts: valid, and about metrics that there are. A running cluster is asked for them by
tests/serving/test_prometheus.py."""

import itertools
import json
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from cluster.dashboard import ROWS, dashboard, dashboard_text
from cluster.generate import RAY_CLUSTER, _read, monitored

REPOSITORY = Path(__file__).parents[2]
ALERTS = REPOSITORY / "cluster/monitoring/alerts.yaml"
STORIES = Path(__file__).parent / "alerts_test.yaml"
RULES: list[dict[str, Any]] = [
    rule for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]
]
QUERIES = [query.promql for panels in ROWS.values() for panel in panels for query in panel.queries]


# Metrics


class Recorded:
    """Stands for any of Ray's metrics; keeps its name, kind and labels."""

    def __init__(self, names: dict[str, set[str]], suffixes: tuple[str, ...], added: set[str]) -> None:
        self._names, self._suffixes, self._added = names, suffixes, added

    def __call__(self, name: str, description: str, boundaries: Any = (), tag_keys: tuple[str, ...] = ()) -> "Recorded":
        for suffix in self._suffixes:
            self._names[f"ray_{name}{suffix}"] = {*tag_keys, *self._added}
        return self

    def set(self, *args: Any, **tags: Any) -> None:
        pass


@pytest.fixture
def exported(monkeypatch: pytest.MonkeyPatch) -> dict[str, set[str]]:
    """Our metrics by the names that Prometheus gets, with their labels."""
    from app.serving import metrics as serving
    from app.training import metrics as training
    from tune import metrics as sweeps

    found: dict[str, set[str]] = {}
    for module, added in ((serving, {"application", "deployment", "replica"}), (training, set()), (sweeps, set())):
        kinds = SimpleNamespace(
            Gauge=Recorded(found, ("",), added),
            Counter=Recorded(found, ("_total",), added),
            Histogram=Recorded(found, ("_bucket", "_count", "_sum"), added | {"le"}),
        )
        monkeypatch.setattr(module, "metrics", kinds)
    serving.GeneratorMetrics(), serving.CacheMetrics(), serving.RetrieverMetrics(), serving.DocumentsMetrics()
    training.RunMetrics("run"), sweeps.SweepMetrics("sweep")
    return found


def strangers(promql: str, exported: dict[str, set[str]]) -> set[str]:
    """Names of metrics that nobody exports, and of labels that ours have not."""
    from ray.dashboard.modules.reporter.reporter_agent import METRICS_GAUGES

    of_nodes = {f"ray_{name}" for name in METRICS_GAUGES}
    names = set(re.findall(r"\bray_\w+", promql))
    ours = {name for name in names if name.startswith("ray_pacos_")}
    missing = {name for name in names if name.startswith("ray_node_")} - of_nodes | ours - exported.keys()
    if ours and ours == names and not missing:
        used = set(re.findall(r'(\w+)(?:=~?|!=)"', promql))
        used |= {
            label.strip() for labels in re.findall(r"\b(?:by|on) \(([^)]*)\)", promql) for label in labels.split(",")
        }
        missing |= used - set.intersection(*(exported[name] for name in ours))
    return missing


def test_whatever_is_asked_for_is_exported(exported: dict[str, set[str]]) -> None:
    for promql in (*QUERIES, *(rule["expr"] for rule in RULES)):
        assert strangers(promql, exported) == set(), promql
    for promql, missing in {
        "ray_pacos_train_lost": {"ray_pacos_train_lost"},
        "rate(ray_pacos_prompt_tokens[1m])": {"ray_pacos_prompt_tokens"},
        "ray_node_cpu_count + ray_node_cpus": {"ray_node_cpus"},
        "sum by (run, model_name) (ray_pacos_train_loss)": {"model_name"},
        'ray_pacos_train_loss{runs=~"a"}': {"runs"},
    }.items():
        assert strangers(promql, exported) == missing


def test_whatever_we_export_of_runs_sweeps_caches_and_searches_is_shown(exported: dict[str, set[str]]) -> None:
    asked = " ".join((*QUERIES, *(rule["expr"] for rule in RULES)))
    shown = {re.sub("_(bucket|count|sum)$", "", name) for name in re.findall(r"\bray_pacos_\w+", asked)}
    ours = {re.sub("_(bucket|count|sum)$", "", name) for name in exported}
    assert ours - shown == {
        "ray_pacos_delta_bytes", "ray_pacos_request_prompt_tokens", "ray_pacos_request_generation_tokens",
        "ray_pacos_request_success_total", "ray_pacos_request_aborted_total", "ray_pacos_train_tokens_total",
    }  # fmt: skip


# The dashboard


def differences(ours: Any, theirs: Any, path: str = "") -> list[str]:
    """Places where `theirs` lacks what `ours` says."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        return [d for key in ours for d in differences(ours[key], theirs.get(key), f"{path}.{key}")]
    if isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        return [
            d
            for place, pair in enumerate(zip(ours, theirs, strict=True))
            for d in differences(*pair, f"{path}.{place}")
        ]
    return [] if ours == theirs else [path]


def unknown_to_grafana(values: dict[str, Any]) -> list[str]:
    """Fields that are lost, or changed, on the way through the types that Grafana generates from its schema."""
    from grafana_foundation_sdk.cog.encoder import JSONEncoder
    from grafana_foundation_sdk.cog.plugins import register_default_plugins
    from grafana_foundation_sdk.models.dashboard import Dashboard

    register_default_plugins()
    return differences(values, json.loads(JSONEncoder().encode(Dashboard.from_json(values))))


def test_grafana_knows_every_field() -> None:
    assert unknown_to_grafana(dashboard()) == []
    for change in ('"legendFormat"->"legend"', '"fillOpacity"->"opacity"', '"allValue"->"all"', '"gridPos"->"grid"'):
        before, after = change.split("->")
        assert unknown_to_grafana(json.loads(dashboard_text().replace(before, after))), change


def test_panels_have_ids_of_their_own_and_do_not_overlap() -> None:
    panels = dashboard()["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels) == len(ROWS) + sum(map(len, ROWS.values()))
    places = [panel["gridPos"] for panel in panels]
    for a, b in itertools.combinations(places, 2):
        apart = a["x"] + a["w"] <= b["x"] or b["x"] + b["w"] <= a["x"]
        assert apart or a["y"] + a["h"] <= b["y"] or b["y"] + b["h"] <= a["y"]
    assert all(place["x"] + place["w"] <= 24 for place in places)


# The alerts


def promtool(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    program = shutil.which("promtool")
    if program is None:
        pytest.skip("promtool is not on PATH; it is in Debian's package prometheus")
    return subprocess.run([program, *map(str, arguments)], capture_output=True, text=True, timeout=60)


def test_prometheus_understands_every_alert_and_every_query(tmp_path: Path) -> None:
    assert promtool("check", "rules", ALERTS).returncode == 0
    rules = [
        {"record": f"query:{number}", "expr": promql.replace("$__rate_interval", "1m")}
        for number, promql in enumerate(QUERIES)
    ]
    file = tmp_path / "queries.yaml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "queries", "rules": rules}]}))
    checked = promtool("check", "rules", file)
    assert checked.returncode == 0, checked.stderr
    file.write_text(file.read_text().replace("histogram_quantile(0.5,", "histogram_quantile("))
    assert promtool("check", "rules", file).returncode != 0


def test_each_alert_fires_in_its_story_and_in_no_other(tmp_path: Path) -> None:
    told = promtool("test", "rules", STORIES)
    assert told.returncode == 0, told.stdout + told.stderr
    assert set(re.findall(r'alertname="(\w+)"', STORIES.read_text())) == {rule["alert"] for rule in RULES}
    (tmp_path / "alerts.yaml").write_text(ALERTS.read_text().replace("> 90", "> 99"))
    stories = STORIES.read_text().replace("../../cluster/monitoring/alerts.yaml", "alerts.yaml")
    (tmp_path / "stories.yaml").write_text(stories)
    told = promtool("test", "rules", tmp_path / "stories.yaml")
    assert told.returncode != 0 and "PacosDiskNearlyFull" in told.stdout + told.stderr


def test_each_alert_says_how_grave_it_is_and_what_to_do() -> None:
    assert len({rule["alert"] for rule in RULES}) == len(RULES)
    for rule in RULES:
        assert rule["labels"]["severity"] in ("warning", "critical"), rule["alert"]
        assert set(rule["annotations"]) == {"summary"} and len(rule["annotations"]["summary"]) > 150, rule["alert"]
        used = set(re.findall(r"\$labels\.(\w+)", rule["annotations"]["summary"]))
        kept = set(re.findall(r"\w+", " ".join(re.findall(r"by \(([^)]*)\)", rule["expr"])))) | {"instance"}
        assert used <= kept, rule["alert"]


def test_the_operations_page_has_every_alert() -> None:
    page = (REPOSITORY / "docs/operations.md").read_text()
    assert set(re.findall(r"`(Pacos\w+)`", page)) == {rule["alert"] for rule in RULES}


# Where they are provisioned


def test_kubernetes_gets_the_same_alerts_and_dashboard() -> None:
    scrape, rules, panels = monitored(_read(RAY_CLUSTER), _read(ALERTS))
    assert rules["spec"] == yaml.safe_load(ALERTS.read_text()) and rules["kind"] == "PrometheusRule"
    assert json.loads(panels["data"]["pacos.json"]) == dashboard()
    (endpoint,) = scrape["spec"]["podMetricsEndpoints"]
    head = _read(RAY_CLUSTER)["spec"]["headGroupSpec"]["template"]["spec"]["containers"][0]
    assert endpoint["port"] in {port["name"] for port in head["ports"]}
    (job,) = (r["replacement"] for r in endpoint["relabelings"] if r["targetLabel"] == "job")
    assert any(f'job="{job}"' in rule["expr"] for rule in RULES)


def test_compose_mounts_them_where_prometheus_and_grafana_look() -> None:
    folder = REPOSITORY / "cluster/docker"
    services = yaml.safe_load((folder / "compose.yaml").read_text())["services"]

    def mounts(service: str) -> dict[str, Path]:
        parts = [volume.split(":") for volume in services[service]["volumes"]]
        return {parts[1]: (folder / parts[0]).resolve() for parts in parts if parts[0].startswith(".")}

    (rules,) = yaml.safe_load((folder / "prometheus.yaml").read_text())["rule_files"]
    assert mounts("prometheus")[rules] == ALERTS
    (provider,) = yaml.safe_load((folder / "grafana-dashboards.yaml").read_text())["providers"]
    shown = {file for path, file in mounts("grafana").items() if Path(path).parent == Path(provider["options"]["path"])}
    assert shown == {REPOSITORY / "cluster/monitoring/dashboard.json"}
