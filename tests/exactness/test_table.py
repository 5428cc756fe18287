"""The table of exactness: a part of it is made anew here; the document that `tests/exactness.sh` writes is whole."""

from pathlib import Path
from typing import Any

import pytest

from tests.exactness import table
from tests.exactness.layouts import LAYOUTS, MODES, quantities

pytestmark = pytest.mark.distributed

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "exactness.md"
PARTS: dict[str, dict[str, Any]] = {
    # Both budget modes, both ways to run; the other combinations are in the document.
    "two ranks": {"ranks": (2,), "modes": ("joint soft",)},
    "four ranks": {"ranks": (4,), "modes": ("sampled sliced",), "only": "PP2"},
}


@pytest.mark.parametrize("part", PARTS)
def test_every_layout_equals_one_process(part: str) -> None:
    rows = table.rows(**PARTS[part])
    assert len(rows) >= 10
    assert not [row for row in rows if not row["ok"]]


def test_the_document_has_every_row_and_all_hold() -> None:
    text = DOCUMENT.read_text()
    wanted = sum(len(quantities(mode)) for mode in MODES) * len(LAYOUTS)
    assert f"{wanted} of {wanted} rows hold." in text
    assert text.count("| yes |") == wanted
    assert all(f"## {name}\n" in text for name in LAYOUTS)
