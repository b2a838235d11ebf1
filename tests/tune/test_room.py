"""How many packs and runs a cluster holds; no Ray."""

from pathlib import Path
from typing import Any

import pytest

from app.config import TrainConfig
from app.errors import UserError
from tune.room import check_nodes, share_out


def trial(tmp_path: Path, **workers: Any) -> TrainConfig:
    return TrainConfig(data=str(tmp_path), output=str(tmp_path), workers={"count": 1, "cpus": 2, **workers})


def nodes(count: int, **resources: float) -> list[dict[str, float]]:
    return [resources] * count


@pytest.mark.parametrize(
    ("cluster", "most", "packs"),
    [
        (nodes(1, CPU=3), None, 1),
        (nodes(1, CPU=2), None, 1),  # less than is needed, but without one it would never end
        (nodes(1, CPU=6), None, 2),  # 6 / 2, but then the trials' own processes would wait for ever
        (nodes(1, CPU=64), 3, 3),
        (nodes(3, CPU=3), None, 3),  # 9 CPUs, of which four processes of two cannot be had
        (nodes(4, CPU=1) + nodes(1, CPU=8), None, 3),
    ],
)
def test_a_pack_lies_on_one_node_and_leaves_room_for_the_trials(
    tmp_path: Path, cluster: list[dict[str, float]], most: int | None, packs: int
) -> None:
    assert share_out(cluster, packed={"a": trial(tmp_path)}, alone=[], most_packs=most) == ({"a": packs}, 0)


def test_bases_and_runs_of_their_own_share_the_cluster(tmp_path: Path) -> None:
    packed = {"a": trial(tmp_path), "b": trial(tmp_path)}
    assert share_out(nodes(2, CPU=9), packed=packed, alone=[], most_packs=None) == ({"a": 4, "b": 4}, 0)
    runs = [trial(tmp_path), trial(tmp_path, count=3)]
    assert share_out(nodes(2, CPU=9), packed=packed, alone=runs, most_packs=1) == ({"a": 1, "b": 1}, 2)
    assert share_out(nodes(1, CPU=3), packed={}, alone=runs, most_packs=None) == ({}, 1)


def test_gpus_count_where_they_are_asked_for(tmp_path: Path) -> None:
    of_gpu = trial(tmp_path, gpus=1)
    assert share_out(nodes(2, CPU=32, GPU=4), packed={"a": of_gpu}, alone=[], most_packs=None) == ({"a": 8}, 0)
    half = trial(tmp_path, gpus=0.5)
    assert share_out(nodes(2, CPU=32, GPU=2), packed={}, alone=[half], most_packs=None) == ({}, 8)


@pytest.mark.parametrize(
    ("cluster", "workers", "told"),
    [
        (nodes(2, CPU=4), {"cpus": 6}, r"cpus=6 and workers\.gpus=0: .* none has as much \(.*: 4 and 0\); lower train"),
        (nodes(2, CPU=8, GPU=1), {"gpus": 2}, r"workers\.cpus=2 and workers\.gpus=2: .*: 8 and 1\)"),
        (nodes(1, CPU=8) + nodes(1, CPU=1, GPU=1), {"gpus": 1}, r": 1 and 1; 8 and 0\)"),
    ],
)
def test_what_no_node_holds_is_refused_before_it_waits_for_ever(
    tmp_path: Path, cluster: list[dict[str, float]], workers: dict[str, float], told: str
) -> None:
    small = trial(tmp_path, cpus=0.5)
    with pytest.raises(UserError, match=told):
        check_nodes(cluster, [small, trial(tmp_path, **workers)])
    check_nodes(nodes(1, CPU=6, GPU=2), [small, trial(tmp_path, **workers)])  # to the last CPU
