"""What a good run shows, judged on its report."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

EQUAL = 1e-5
SIZE_TOLERANCE = 0.02
NATS_BELOW_UNIGRAM = 1.0
FULL_TOLERANCE = 0.02
GAP_CLOSED = 0.70
MINIMUM_TOKENS = 50_000


@dataclass(frozen=True)
class Check:
    """One expectation: what is judged, its value and its rule in words, and whether it holds."""

    name: str
    value: str
    rule: str
    passed: bool


def gap_closed(untrained: float, trained: float, parent: float) -> float:
    """Share of the distance between an untrained cut and the parent that training made up for; 1 where none is."""
    gap = untrained - parent
    return 1.0 if gap <= 0 and trained <= untrained else (untrained - trained) / abs(gap) if gap else 0.0


def _of_budget(budget: Mapping[str, Any], parent: Mapping[str, Any], smallest: bool) -> list[Check]:
    name, trained = budget["name"], budget["validation_loss_extracted"]
    share = budget["parameters"] / (parent["parameters"] * budget["fraction"])
    apart = abs(trained - budget["validation_loss_family"])
    found = [
        Check(f"{name}: parameters against the target", f"{share:.4f}", "within 2 %", abs(share - 1) <= SIZE_TOLERANCE),
        Check(f"{name}: extracted against inside the family", f"{apart:.1e} nats", "at most 1e-5", apart <= EQUAL),
    ]
    if budget["fraction"] >= 1.0:
        ratio = trained / parent["validation_loss"]
        rule = "at most 1.02"
        found.append(Check(f"{name}: loss over the parent's", f"{ratio:.4f}", rule, ratio <= 1 + FULL_TOLERANCE))
        return found
    untrained, random = budget["validation_loss_untrained"], budget["validation_loss_random_cut"]
    closed = gap_closed(untrained, trained, parent["validation_loss"])
    found.append(Check(f"{name}: gap to the parent closed", f"{closed:.1%}", "at least 70 %", closed >= GAP_CLOSED))
    gain = random - untrained
    found.append(Check(f"{name}: untrained cut below random cuts", f"{gain:.4f} nats", "above 0", gain > 0))
    if smallest:
        scratch = budget["validation_loss_from_scratch"]
        gain = float("nan") if scratch is None else scratch - trained
        found.append(Check(f"{name}: below the same shape from scratch", f"{gain:.4f} nats", "above 0", gain > 0))
    return found


def check_report(report: Mapping[str, Any]) -> list[Check]:
    """Judges a report.

    Args:
        report: what `report.json` holds, schema 1.

    Returns:
        Every expectation, those that fail included.
    """
    parent, budgets, tokens = report["parent"], report["budgets"], report["validation_tokens"]
    below = report["unigram_entropy"] - parent["validation_loss"]
    found = [
        Check("validation tokens", f"{tokens:,}", "at least 50,000", tokens >= MINIMUM_TOKENS),
        Check("parent: below the unigram entropy", f"{below:.3f} nats", "at least 1.0", below >= NATS_BELOW_UNIGRAM),
    ]
    for budget in budgets:
        found.extend(_of_budget(budget, parent, budget is budgets[-1]))
    return found
