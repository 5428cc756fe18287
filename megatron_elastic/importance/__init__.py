"""Importance of channels, neurons, heads, experts and layers, measured on calibration text."""

from megatron_elastic.importance.ranking import rank_parent
from megatron_elastic.importance.scores import DepthRanking, Scores

__all__ = ["DepthRanking", "Scores", "rank_parent"]
