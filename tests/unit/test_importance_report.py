"""Importance as a table and a plot."""

import pytest

from megatron_elastic.report.importance import Spread, plot_importance, table

DEPTH = [(2, "*", 0.01), (0, "M", 0.5), (1, "-", 0.7)]


def spreads() -> list[Spread]:
    return [
        Spread.of("all layers", "hidden", [[1.0, 4.0, 3.0, 2.0]], 0.5),
        Spread.of("layer 0 E", "expert_ffn", [[8.0, 2.0], [0.5, 1.5]], 0.5),
    ]


def test_what_the_smallest_choice_keeps_is_a_share_of_the_importance() -> None:
    hidden, experts = spreads()
    assert hidden.as_dict() == {
        "place": "all layers", "axis": "hidden", "entries": 4, "highest": 4.0, "median": 2.0, "lowest": 1.0,
        "kept_by_smallest": pytest.approx(0.7),
    }  # fmt: skip
    # Half of each expert's own neurons, not half of all of them.
    assert experts.kept == pytest.approx(9.5 / 12)
    assert list(experts.scores) == [8.0, 2.0, 1.5, 0.5]
    assert Spread.of("layer 1 -", "ffn", [[0.0, 0.0]], 0.5).kept == 0.0


def test_the_table_has_a_line_a_place_and_the_layers_in_their_order() -> None:
    lines = table(spreads(), DEPTH).splitlines()
    assert [line.split()[:3] for line in lines[3:5]] == [["all", "layers", "hidden"], ["layer", "0", "E"]]
    assert lines[3].endswith("70.0%")
    assert [line.split() for line in lines[-3:]] == [["2", "*", "0.01"], ["0", "M", "0.5"], ["1", "-", "0.7"]]
    assert "layers" not in table(spreads()[1:], []).splitlines()[-1]


@pytest.mark.parametrize("depth", [DEPTH, []])
def test_the_plot_is_a_png(tmp_path, depth) -> None:
    plot_importance(spreads(), depth, tmp_path / "new" / "scores.png")
    assert (tmp_path / "new" / "scores.png").read_bytes().startswith(b"\x89PNG")
