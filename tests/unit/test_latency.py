"""The table of measured latencies: exact at its points, linear between them, and particular about what it is given."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_elastic.errors import ElasticError
from megatron_elastic.latency import LatencyTable

POINTS: dict[str, Any] = {
    "device": "a card, batch 8",
    "outside": [{"hidden": 16, "latency": 3.5}, {"hidden": 8, "latency": 2.0}],
    "layers": {
        "-": [
            {"hidden": hidden, "ffn": ffn, "latency": latency}
            for (hidden, ffn), latency in {(8, 10): 0.1, (8, 30): 0.7, (16, 10): 0.3, (16, 30): 2.0}.items()
        ],
        "*": [{"hidden": 16, "latency": 0.25}, {"hidden": 12, "latency": 0.2}, {"hidden": 8, "latency": 0.1}],
    },
}
TABLE = LatencyTable.from_dict(POINTS)


def test_exact_at_every_point() -> None:
    for kind, points in POINTS["layers"].items():
        for point in points:
            assert TABLE.layer(kind, {"attention_heads": 3, **point}) == point["latency"]
            sizes = {axis: torch.tensor(float(size), dtype=torch.float64) for axis, size in point.items()}
            assert TABLE.layer(kind, sizes).item() == point["latency"]


def test_linear_between_the_points() -> None:
    assert TABLE.layer("*", {"hidden": 14}) == pytest.approx(0.225)
    assert TABLE.layer("*", {"hidden": 9}) == pytest.approx(0.125)
    middle = TABLE.layer("-", {"hidden": 12, "ffn": 25})
    assert middle == pytest.approx((0.25 * (0.1 + 0.3) + 0.75 * (0.7 + 2.0)) / 2)
    hidden = torch.tensor(12.0, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(TABLE.layer("-", {"hidden": hidden, "ffn": 25}), hidden)
    assert slope.item() == pytest.approx((0.25 * 0.2 + 0.75 * 1.3) / 8)


def test_the_rounding_of_an_expected_size_is_no_reason_to_stop() -> None:
    over = torch.tensor(16.0 * (1 + 1e-9), dtype=torch.float64)
    assert TABLE.outside.at({"hidden": over}).item() == pytest.approx(3.5)
    with pytest.raises(ElasticError, match=r"outside: hidden 17 lies outside 8..16"):
        TABLE.outside.at({"hidden": 17})


def test_a_single_point_holds_for_itself() -> None:
    table = LatencyTable.from_dict({"outside": [{"hidden": 8, "latency": 1.0}], "layers": {}})
    assert table.outside.at({"hidden": 8}) == 1.0
    with pytest.raises(ElasticError, match="hidden 7 lies outside"):
        table.outside.at({"hidden": 7})


def test_a_kind_that_was_not_measured() -> None:
    with pytest.raises(ElasticError, match=r"no points of layers 'M' \(Mamba-2\)"):
        TABLE.layer("M", {"hidden": 8})


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"layers": {}, "outside": []}, "must be a list of points"),
        ({"layers": []}, "must map `outside` to points"),
        ({"layers": {"Q": []}}, "layer kinds ['Q']"),
        ({"layers": {"-": [{"ffn": 8, "latency": 1}, {"hidden": 8, "latency": 1}]}}, "the same axes"),
        ({"layers": {"-": [{"experts": 8, "latency": 1}]}}, "'experts': 8"),
        ({"layers": {"-": [{"ffn": 8, "latency": 0}]}}, "must give a positive number"),
        ({"layers": {"-": [{"ffn": 8, "latency": 1}, {"ffn": 8, "latency": 2}]}}, "a point is given twice"),
        (
            {"layers": {"-": [{"hidden": h, "ffn": f, "latency": 1} for h, f in ((8, 8), (8, 16), (4, 8))]}},
            "{'hidden': 4, 'ffn': 16} is missing",
        ),
    ],
)
def test_what_is_wrong_is_said(change: dict[str, Any], text: str) -> None:
    with pytest.raises(ElasticError) as caught:
        LatencyTable.from_dict({**POINTS, **change}, "my table")
    assert text in str(caught.value)
    assert "my table" in str(caught.value)


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "latency.json"
    path.write_text(json.dumps(POINTS))
    assert LatencyTable.load(path) == TABLE
    (tmp_path / "broken.yaml").write_text("layers: [")
    for name in ("broken.yaml", "absent.yaml"):
        with pytest.raises(ElasticError, match=f"latency table .*{name}: cannot be read"):
            LatencyTable.load(tmp_path / name)
