"""Importance of hidden channels, neurons and heads, measured on calibration text."""

from megatron_elastic.importance.ranking import rank_parent
from megatron_elastic.importance.scores import AXIS_OF_KIND, Scores

__all__ = ["AXIS_OF_KIND", "Scores", "rank_parent"]
