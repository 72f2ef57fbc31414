"""Measures: published measurements of a whole model, each one small class.

A statistic sees one attention call of a forward that the user runs. A measure runs the model
itself: on probe sequences of its own, with heads taken out, with gradients, over hidden states. It
leaves the model as it found it.
"""

from __future__ import annotations

from attnbias.measures.adaptive_heads import AdaptiveHeads, AdaptiveScores, moments_of
from attnbias.measures.attention_influence import AttentionInfluence, Influence
from attnbias.measures.base import HeadMeasure, Measure
from attnbias.measures.cmr import CMR
from attnbias.measures.episodic_memory import EpisodicMemory
from attnbias.measures.head_importance import HeadAblation, HeadImportance
from attnbias.measures.head_pruning import HeadPruning, Pruned, remove_heads
from attnbias.measures.in_context import InContext, InContextAblation, InContextScore
from attnbias.measures.induction_heads import InductionHeads
from attnbias.measures.lag_profile import LagProfile
from attnbias.measures.massive_activations import MassiveActivations
from attnbias.measures.position_curve import PositionCurve, position_curve
from attnbias.measures.position_saliency import PositionSaliency
from attnbias.measures.position_sensitivity import PositionSensitivity, Retrieval
from attnbias.measures.positional_heads import PositionalHeads
from attnbias.measures.retrieval_heads import RetrievalHeads, haystacks
from attnbias.measures.scores import Scores
from attnbias.measures.sink_metric import SinkMetric

__all__ = [
    "CMR",
    "AdaptiveHeads",
    "AdaptiveScores",
    "AttentionInfluence",
    "EpisodicMemory",
    "HeadAblation",
    "HeadImportance",
    "HeadMeasure",
    "HeadPruning",
    "InContext",
    "InContextAblation",
    "InContextScore",
    "InductionHeads",
    "Influence",
    "LagProfile",
    "MassiveActivations",
    "Measure",
    "PositionCurve",
    "PositionSaliency",
    "PositionSensitivity",
    "PositionalHeads",
    "Pruned",
    "Retrieval",
    "RetrievalHeads",
    "Scores",
    "SinkMetric",
    "haystacks",
    "moments_of",
    "position_curve",
    "remove_heads",
]
