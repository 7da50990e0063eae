"""What an analysis returns: frozen numbers with axes, units, intervals, controls and provenance.

Nothing here computes; nothing here holds a model, a figure or a file handle. Arrays are numpy, on the CPU, float64.
"""

from mechicl.results.anchored import Strategies, StrategyScore
from mechicl.results.answers import Ablation, AblationCell, DoseCurve, ICLAccuracy
from mechicl.results.attribution import Agreement, Attribution, EdgeScores, FunctionVector, HeadOverlap, VectorEffect
from mechicl.results.base import Estimate, Head, Provenance, Skipped
from mechicl.results.circuits import (
    Circuit,
    CircuitBenchmark,
    CircuitCurve,
    CircuitNode,
    CircuitOverlap,
    EdgeLoss,
    KindOverlap,
    MethodRecovery,
    NodeGap,
)
from mechicl.results.factors import ConditionRow, ConditionTable, Decomposition, FactorShares, MixedEffects, TaskEffects
from mechicl.results.heads import HeadScores, PromptView, RoleAttention, Score
from mechicl.results.heads_at_odds import HeadsAtOdds, OddsContrast, OddsCost, OddsRow, OddsSetting
from mechicl.results.link import LinkBaseline, LinkChange, LinkCost, LinkPrior, LinkPriorRow, LinkScore, LinkScores
from mechicl.results.margin import ContrastMap, ContrastMargin, MarginEffect, MarginPart
from mechicl.results.nodes import Edge, Receiver, Sender
from mechicl.results.patching import PatchCost, PatchEffects, SiteEffects, Transplant, TransplantRow
from mechicl.results.paths import PathEffects, SpanKnockOut, SpanKnockOuts
from mechicl.results.protocol import (
    KnockOutRow,
    KnockOuts,
    Overlap,
    ProtocolStudy,
    PublishedNumber,
    RankingMatch,
    StudyCost,
    Tuning,
    TuningChange,
)
from mechicl.results.readout import Copying, HeadCircuits, LogitAttribution, LogitLens, PromptLens, QKMatch
from mechicl.results.shift import FillerTest, KVShift, SimilarityEffect, SimilarityTest
from mechicl.results.study import HeadSet, KVStory, Series, Study, Trace
from mechicl.results.trainings import Bands, ChangePoint, Claim, Correlations, Emergence, Forest, KnockOut, KnockOutTable

__all__ = [
    "Ablation",
    "AblationCell",
    "Agreement",
    "Attribution",
    "Bands",
    "ChangePoint",
    "Circuit",
    "CircuitBenchmark",
    "CircuitCurve",
    "CircuitNode",
    "CircuitOverlap",
    "Claim",
    "ConditionRow",
    "ConditionTable",
    "ContrastMap",
    "ContrastMargin",
    "Copying",
    "Correlations",
    "Decomposition",
    "DoseCurve",
    "Edge",
    "EdgeLoss",
    "EdgeScores",
    "Emergence",
    "Estimate",
    "FactorShares",
    "FillerTest",
    "Forest",
    "FunctionVector",
    "Head",
    "HeadCircuits",
    "HeadOverlap",
    "HeadScores",
    "HeadSet",
    "HeadsAtOdds",
    "ICLAccuracy",
    "KVShift",
    "KVStory",
    "KindOverlap",
    "KnockOut",
    "KnockOutRow",
    "KnockOutTable",
    "KnockOuts",
    "LinkBaseline",
    "LinkChange",
    "LinkCost",
    "LinkPrior",
    "LinkPriorRow",
    "LinkScore",
    "LinkScores",
    "LogitAttribution",
    "LogitLens",
    "MarginEffect",
    "MarginPart",
    "MethodRecovery",
    "MixedEffects",
    "NodeGap",
    "OddsContrast",
    "OddsCost",
    "OddsRow",
    "OddsSetting",
    "Overlap",
    "PatchCost",
    "PatchEffects",
    "PathEffects",
    "PromptLens",
    "PromptView",
    "ProtocolStudy",
    "Provenance",
    "PublishedNumber",
    "QKMatch",
    "RankingMatch",
    "Receiver",
    "RoleAttention",
    "Score",
    "Sender",
    "Series",
    "SimilarityEffect",
    "SimilarityTest",
    "SiteEffects",
    "Skipped",
    "SpanKnockOut",
    "SpanKnockOuts",
    "Strategies",
    "StrategyScore",
    "Study",
    "StudyCost",
    "TaskEffects",
    "Trace",
    "Transplant",
    "TransplantRow",
    "Tuning",
    "TuningChange",
    "VectorEffect",
]
