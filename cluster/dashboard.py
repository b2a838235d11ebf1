"""The Grafana dashboard: which panels there are, and their queries. `python -m cluster.generate` writes it as
`monitoring/dashboard.json`.

Plain dictionaries of what a panel cannot do without: Grafana fills in the rest. Its own library for this has not
followed it since version 11.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

_DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
_ACROSS, _WIDTH, _HEIGHT = 3, 8, 7
"""Panels in a line, and their size; Grafana's lines are 24 wide."""


@dataclass(frozen=True)
class Query:
    promql: str
    legend: str


@dataclass(frozen=True)
class Panel:
    title: str
    queries: Sequence[Query]
    unit: str = "short"
    """Of Grafana's: percentunit is a share from 0 to 1."""
    most: float | None = None
    text: str = ""
    """Shown at the title's ⓘ."""


def _one(title: str, promql: str, legend: str, unit: str = "short", **more: Any) -> Panel:
    return Panel(title, [Query(promql, legend)], unit, **more)


def _quantiles(title: str, histogram: str, **more: Any) -> Panel:
    rate = _rate(f"{histogram}_bucket", "le")
    queries = [Query(f"histogram_quantile({q}, {rate})", f"p{100 * q:g}") for q in (0.5, 0.9, 0.99)]
    return Panel(title, queries, "s", **more)


def _rate(metric: str, by: str = "") -> str:
    """A second, by a label or in all."""
    return f"sum{f' by ({by}) ' if by else ''}(rate({metric}[$__rate_interval]))"


def _rate_or_zero(metric: str) -> str:
    return f"{_rate(metric)} or vector(0)"


def _share(title: str, part: str, whole: str, legend: str, **more: Any) -> Panel:
    return _one(title, f"({_rate_or_zero(part)}) / {_rate(whole)}", legend, "percentunit", most=1, **more)


def _of_runs(metric: str) -> str:
    """Of the chosen ones that go on."""
    return f'max by (run) (ray_pacos_train_{metric}{{run=~"$run"}})'


_TRAINING = (
    Panel(
        "Loss",
        [Query(_of_runs("loss"), "{{run}}"), Query(_of_runs("eval_loss"), "{{run}} held out")],
        text="Nats per response token: of each step's batch, and of the held-out records.",
    ),
    _one("Tokens per second", _of_runs("tokens_per_second"), "{{run}}", text="Padding left out."),
    _one("Steps", _of_runs("step"), "{{run}}"),
    _one("Learning rate", _of_runs("learning_rate"), "{{run}}", "sci"),
    _one("Gradient norm", _of_runs("gradient_norm"), "{{run}}", text="Before clipping."),
    _one("Most memory of the first worker", _of_runs("peak_worker_bytes"), "{{run}}", "bytes"),
    _one("Runs that go on", "sum(max by (run) (ray_pacos_train_running))", "runs"),
    _one("Workers", _of_runs("workers"), "{{run}}", text="In a pack, the run's share of one."),
    _one(
        "Runs that have ended",
        "sum by (outcome) (ray_pacos_train_runs_ended_total)",
        "{{outcome}}",
        text="Since the nodes that they ran on were started.",
    ),
)

_SWEEPS = (
    _one("Trials", "max by (sweep, state) (ray_pacos_sweep_trials)", "{{sweep}} {{state}}"),
    _one("Best held-out loss", "min by (sweep) (ray_pacos_sweep_best_loss)", "{{sweep}}"),
    _one("Tokens trained on", "max by (sweep) (ray_pacos_sweep_tokens)", "{{sweep}}"),
)

_REQUESTS = "ray_serve_num_http_requests_total"

_SERVING = (
    _one("Requests per second", _rate(_REQUESTS, "status_code"), "{{status_code}}", "reqps"),
    _share("Errors", f'{_REQUESTS}{{status_code=~"5.."}}', _REQUESTS, "5xx"),
    _one("Refusals per second", _rate("ray_pacos_request_refused_total", "code"), "{{code}}", "reqps"),
    _quantiles("Time to first token", "ray_pacos_time_to_first_token_seconds"),
    _quantiles("From token to token", "ray_pacos_inter_token_latency_seconds"),
    _quantiles("Whole answers", "ray_pacos_e2e_request_latency_seconds"),
    Panel(
        "Tokens per second",
        [
            Query(_rate("ray_pacos_prompt_tokens_total"), "of prompts"),
            Query(_rate("ray_pacos_generation_tokens_total"), "generated"),
        ],
    ),
    Panel(
        "Answers in the engines",
        [
            Query("sum(ray_pacos_num_requests_running)", "being generated"),
            Query("sum(ray_pacos_num_requests_waiting)", "waiting"),
        ],
    ),
    _one(
        "KV cache in use",
        "max by (model_name, replica) (ray_pacos_kv_cache_usage_perc)",
        "{{model_name}} {{replica}}",
        "percentunit",
        most=1,
    ),
    _one(
        "Share of a full batch's tokens per second",
        "max by (model_name, replica) (ray_pacos_engine_usage_perc)",
        "{{model_name}} {{replica}}",
        "percentunit",
        most=1,
        text="What generators are scaled by.",
    ),
    _share(
        "Prompt tokens found in the KV cache",
        "ray_pacos_prefix_cache_hits_total",
        "ray_pacos_prompt_tokens_total",
        "share",
    ),
    _one(
        "Answers that gave up their place",
        _rate_or_zero("ray_pacos_num_preemptions_total"),
        "per second",
        text="Their blocks of the KV cache went to others, and they were computed again.",
    ),
    Panel(
        "Replicas",
        [
            Query("count by (deployment) (ray_serve_replica_processing_queries)", "{{deployment}}"),
            Query("max by (deployment) (ray_serve_autoscaling_target_replicas)", "{{deployment}} wanted"),
        ],
    ),
)

_LOOKUPS = "ray_pacos_response_cache_requests_total"

_CACHE = (
    _one("Requests by what the cache had", _rate(_LOOKUPS, "result"), "{{result}}", "reqps"),
    _share(
        "Answers from the cache",
        f'{_LOOKUPS}{{result=~"hit|semantic"}}',
        f'{_LOOKUPS}{{result!="uncached"}}',
        "share",
        text="Of the requests that may be answered from it.",
    ),
    _one("Memory", "max by (replica) (ray_pacos_response_cache_bytes)", "{{replica}}", "bytes"),
    _one("Backend left alone", "max by (replica) (ray_pacos_response_cache_backend_out)", "{{replica}}", most=1),
    _one(
        "Failed lookups and writes",
        _rate_or_zero("ray_pacos_response_cache_errors_total"),
        "per second",
    ),
)

_RETRIEVAL = (
    _quantiles("Searches", "ray_pacos_retriever_search_seconds"),
    _one("Searches per second", _rate("ray_pacos_retriever_search_seconds_count", "mode"), "{{mode}}", "reqps"),
    _one("Documents", "max by (replica) (ray_pacos_retriever_documents)", "{{replica}}"),
    _one(
        "Behind the uploads",
        "max by (replica) (ray_pacos_retriever_lag_seconds)",
        "{{replica}}",
        "s",
        text="Since when there may be changes that a replica does not search yet.",
    ),
    _one(
        "Changes behind",
        "clamp_min(scalar(max(ray_pacos_documents_version)) - max by (replica) (ray_pacos_retriever_version), 0)",
        "{{replica}}",
    ),
)

_CLUSTER = (
    _one("Nodes", "count(group by (ip) (ray_node_cpu_count))", "nodes"),
    Panel(
        "Logical CPUs and GPUs",
        [
            Query('sum by (Name) (ray_resources{Name=~"CPU|GPU",State="USED"})', "{{Name}} in use"),
            Query('sum by (Name) (ray_resources{Name=~"CPU|GPU"})', "{{Name}} there"),
        ],
    ),
    _one("CPU", "max by (ip) (ray_node_cpu_utilization)", "{{ip}}", "percent", most=100),
    _one("Memory", "max by (ip) (ray_node_mem_used / ray_node_mem_total)", "{{ip}}", "percentunit", most=1),
    _one(
        "GPU",
        "max by (ip, GpuIndex) (ray_node_gpus_utilization)",
        "{{ip}} {{GpuIndex}}",
        "percent",
        most=100,
    ),
    _one(
        "GPU memory",
        "max by (ip, GpuIndex) (ray_node_gram_used / (ray_node_gram_used + ray_node_gram_available))",
        "{{ip}} {{GpuIndex}}",
        "percentunit",
        most=1,
    ),
    _one("Disk", "max by (ip) (ray_node_disk_utilization_percentage)", "{{ip}}", "percent", most=100),
    _one("Object store", "sum by (Location) (ray_object_store_memory)", "{{Location}}", "bytes"),
    _one("Actors", "sum by (State) (ray_actors)", "{{State}}"),
)

ROWS: dict[str, Sequence[Panel]] = {
    "Training": _TRAINING,
    "Sweeps": _SWEEPS,
    "Serving": _SERVING,
    "Answer cache": _CACHE,
    "Retrieval": _RETRIEVAL,
    "Cluster": _CLUSTER,
}


def dashboard() -> dict[str, Any]:
    return {
        "uid": "pacos",
        "title": "Pacos",
        "tags": ["pacos", "ray"],
        "timezone": "browser",
        "schemaVersion": 41,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "graphTooltip": 1,  # the crosshair is at the same time in all panels
        "templating": {"list": [_DATASOURCES, _RUNS]},
        "panels": list(_panels()),
    }


def dashboard_text() -> str:
    return json.dumps(dashboard(), indent=2, ensure_ascii=False) + "\n"


_DATASOURCES = {"name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus"}
_RUNS = {
    "name": "run",
    "label": "Run",
    "type": "query",
    "datasource": _DATASOURCE,
    "query": {"query": "label_values(ray_pacos_train_running, run)", "refId": "run"},
    "refresh": 2,  # whenever the time range changes
    "sort": 1,
    "multi": True,
    "includeAll": True,
    "allValue": ".*",
    "current": {"text": "All", "value": "$__all"},
}


def _panels() -> Iterator[dict[str, Any]]:
    number, top = 0, 0
    for title, panels in ROWS.items():
        number += 1
        place = {"x": 0, "y": top, "w": _ACROSS * _WIDTH, "h": 1}
        yield {"id": number, "type": "row", "title": title, "collapsed": False, "gridPos": place, "panels": []}
        top += 1
        for position, panel in enumerate(panels):
            number += 1
            line, column = divmod(position, _ACROSS)
            place = {"x": column * _WIDTH, "y": top + line * _HEIGHT, "w": _WIDTH, "h": _HEIGHT}
            yield {"id": number, "gridPos": place, **_time_series(panel)}
        top += -(-len(panels) // _ACROSS) * _HEIGHT


def _time_series(panel: Panel) -> dict[str, Any]:
    limits = {"min": 0, "max": panel.most} if panel.most is not None else {}
    return {
        "type": "timeseries",
        "title": panel.title,
        "description": panel.text,
        "datasource": _DATASOURCE,
        "fieldConfig": {
            "defaults": {"unit": panel.unit, **limits, "custom": {"fillOpacity": 8, "showPoints": "never"}},
            "overrides": [],
        },
        "options": {
            "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True, "calcs": []},
            "tooltip": {"mode": "multi", "sort": "desc"},
        },
        "targets": [
            {"refId": chr(ord("A") + place), "expr": query.promql, "legendFormat": query.legend, "range": True}
            for place, query in enumerate(panel.queries)
        ],
    }
