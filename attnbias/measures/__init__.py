"""Measures: published measurements of a whole model, each one small class.

A statistic sees one attention call of a forward that the user runs. A measure runs the model
itself: on probe sequences of its own, with heads taken out, with gradients, over hidden states. It
leaves the model as it found it.
"""

from __future__ import annotations

from attnbias.measures.adaptive_heads import AdaptiveHeads, AdaptiveScores, moments_of
from attnbias.measures.attention_gradient import AttentionGradient
from attnbias.measures.attention_influence import AttentionInfluence, Influence
from attnbias.measures.attention_probe import AttentionProbe
from attnbias.measures.attention_progress import AttentionProgress
from attnbias.measures.base import HeadMeasure, Measure
from attnbias.measures.cmr import CMR
from attnbias.measures.entity_awareness import EntityAwareness
from attnbias.measures.episodic_memory import EpisodicMemory
from attnbias.measures.head_distances import HeadDistances
from attnbias.measures.head_importance import HeadAblation, HeadImportance
from attnbias.measures.head_pruning import HeadPruning, Pruned, remove_heads
from attnbias.measures.head_relations import HeadRelations
from attnbias.measures.in_context import InContext, InContextAblation, InContextScore
from attnbias.measures.induction_heads import InductionHeads
from attnbias.measures.lag_profile import LagProfile
from attnbias.measures.locality import Locality
from attnbias.measures.massive_activations import MassiveActivations
from attnbias.measures.mixing import Mixing
from attnbias.measures.offset_heads import OffsetHeads
from attnbias.measures.pattern_catalogue import PatternCatalogue, Patterns
from attnbias.measures.position_curve import PositionCurve, position_curve
from attnbias.measures.position_saliency import PositionSaliency
from attnbias.measures.position_sensitivity import PositionSensitivity, Retrieval
from attnbias.measures.positional_heads import PositionalHeads
from attnbias.measures.preplan_anchor import PreplanAnchor, Rhythm
from attnbias.measures.pruning_importance import PruningImportance
from attnbias.measures.reference_frame import ReferenceFrame
from attnbias.measures.retrieval_heads import RetrievalHeads, haystacks
from attnbias.measures.scores import Scores
from attnbias.measures.secondary_sinks import SecondarySinks
from attnbias.measures.sink_metric import SinkMetric
from attnbias.measures.temporal_heads import TemporalHeads
from attnbias.measures.visual_heads import VisualHeads, stage_others, stage_top
from attnbias.measures.word_form import WordForm
from attnbias.measures.word_maps import WordMaps

__all__ = [
    "CMR",
    "AdaptiveHeads",
    "AdaptiveScores",
    "AttentionGradient",
    "AttentionInfluence",
    "AttentionProbe",
    "AttentionProgress",
    "EntityAwareness",
    "EpisodicMemory",
    "HeadAblation",
    "HeadDistances",
    "HeadImportance",
    "HeadMeasure",
    "HeadPruning",
    "HeadRelations",
    "InContext",
    "InContextAblation",
    "InContextScore",
    "InductionHeads",
    "Influence",
    "LagProfile",
    "Locality",
    "MassiveActivations",
    "Measure",
    "Mixing",
    "OffsetHeads",
    "PatternCatalogue",
    "Patterns",
    "PositionCurve",
    "PositionSaliency",
    "PositionSensitivity",
    "PositionalHeads",
    "PreplanAnchor",
    "Pruned",
    "PruningImportance",
    "ReferenceFrame",
    "Retrieval",
    "RetrievalHeads",
    "Rhythm",
    "Scores",
    "SecondarySinks",
    "SinkMetric",
    "TemporalHeads",
    "VisualHeads",
    "WordForm",
    "WordMaps",
    "haystacks",
    "moments_of",
    "position_curve",
    "remove_heads",
    "stage_others",
    "stage_top",
]
