"""Penjing makes trained neural networks smaller and faster while their quality holds, and proves it.

Importing this package imports no framework; each name is loaded when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_NAMES = {
    "Task": "penjing.core.task",
    "Split": "penjing.core.task",
    "Budget": "penjing.core.budget",
    "Target": "penjing.core.target",
    "Refused": "penjing.core.errors",
    "Change": "penjing.core.method",
    "Method": "penjing.core.method",
    "Measurement": "penjing.core.measurement",
    "chain": "penjing.core.plan",
    "only": "penjing.core.plan",
    "apply": "penjing.core.apply",
    "Applied": "penjing.core.apply",
    "deliver": "penjing.core.artefact",
    "load": "penjing.core.artefact",
    "load_onnx": "penjing.backends.onnx.model",
    "measure": "penjing.measurement.measure",
    "optimize": "penjing.search.optimize",
    "quantize_checkpoint": "penjing.language.checkpoint",
    "QuantizedCheckpoint": "penjing.language.checkpoint_delivery",
    "read_codes": "penjing.language.codes",
    "load_quantized": "penjing.language.codes",
    "verify": "penjing.search.verify",
    "Result": "penjing.search.record",
    "Verdict": "penjing.core.verdict",
    "RemoveBlocks": "penjing.prune.blocks",
    "PruneChannels": "penjing.prune.channels",
    "PruneTransformer": "penjing.prune.transformer",
    "PruneMagnitude": "penjing.prune.magnitude",
    "PruneGradually": "penjing.prune.gradual",
    "PruneSecondOrder": "penjing.prune.second_order",
    "PruneKFAC": "penjing.prune.kfac",
    "PruneWanda": "penjing.prune.wanda",
    "PruneSparseGPT": "penjing.prune.sparsegpt",
    "PruneOBC": "penjing.prune.obc",
    "PruneALPS": "penjing.prune.alps",
    "ReestimateBatchNorm": "penjing.repair.batchnorm",
    "CorrectBias": "penjing.repair.bias",
    "ReplaceBatchNorm": "penjing.repair.group_norm",
    "LeastSquares": "penjing.repair.least_squares",
    "MatchStatistics": "penjing.repair.match_statistics",
    "FineTune": "penjing.train.finetune",
    "distill": "penjing.experiments.distill",
    "shrunk": "penjing.experiments.shrink",
    "Distill": "penjing.distillation.logits",
    "DistillFeatures": "penjing.distillation.features",
    "DistillBlocks": "penjing.distillation.blocks",
    "DistillOnPolicy": "penjing.distillation.on_policy",
    "DistillRelations": "penjing.distillation.relations",
    "Strategy": "penjing.train.strategy",
    "fit": "penjing.experiments.fit",
    "Fitted": "penjing.experiments.fit",
    "range_test": "penjing.experiments.range_test",
    "tune": "penjing.experiments.tune",
    "Tuned": "penjing.experiments.tuned",
    "stability": "penjing.experiments.stability",
    "Stability": "penjing.experiments.stability",
    "Int8Static": "penjing.quantize.int8_static",
    "Int8Dynamic": "penjing.quantize.int8_dynamic",
    "QuantizeNearest": "penjing.quantize.nearest",
    "QuantizeEmbeddings": "penjing.quantize.embeddings",
    "QuantizeReconstruct": "penjing.quantize.reconstruct",
    "MixedBits": "penjing.calibration.rounding",
    "QuantizeGPTQ": "penjing.quantize.gptq",
    "QuantizeAWQ": "penjing.quantize.awq",
    "QuantizeAutoRound": "penjing.quantize.autoround",
    "EqualizeWeights": "penjing.quantize.equalize",
    "SmoothActivations": "penjing.quantize.smooth",
    "TrainQuantized": "penjing.quantize.train",
    "WeightOnly": "penjing.quantize.weight_only",
    "NumberFormat": "penjing.core.number_format",
    "number_format": "penjing.core.number_format",
}

__all__ = [*_NAMES, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module 'penjing' has no attribute {name!r}")
    value = getattr(importlib.import_module(_NAMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


if TYPE_CHECKING:
    from penjing.backends.onnx.model import load_onnx as load_onnx
    from penjing.calibration.rounding import MixedBits as MixedBits
    from penjing.core.apply import Applied as Applied
    from penjing.core.apply import apply as apply
    from penjing.core.artefact import deliver as deliver
    from penjing.core.artefact import load as load
    from penjing.core.budget import Budget as Budget
    from penjing.core.errors import Refused as Refused
    from penjing.core.measurement import Measurement as Measurement
    from penjing.core.method import Change as Change
    from penjing.core.method import Method as Method
    from penjing.core.number_format import NumberFormat as NumberFormat
    from penjing.core.number_format import number_format as number_format
    from penjing.core.plan import chain as chain
    from penjing.core.plan import only as only
    from penjing.core.target import Target as Target
    from penjing.core.task import Split as Split
    from penjing.core.task import Task as Task
    from penjing.core.verdict import Verdict as Verdict
    from penjing.distillation.blocks import DistillBlocks as DistillBlocks
    from penjing.distillation.features import DistillFeatures as DistillFeatures
    from penjing.distillation.logits import Distill as Distill
    from penjing.distillation.on_policy import DistillOnPolicy as DistillOnPolicy
    from penjing.distillation.relations import DistillRelations as DistillRelations
    from penjing.experiments.distill import distill as distill
    from penjing.experiments.fit import Fitted as Fitted
    from penjing.experiments.fit import fit as fit
    from penjing.experiments.range_test import range_test as range_test
    from penjing.experiments.shrink import shrunk as shrunk
    from penjing.experiments.stability import Stability as Stability
    from penjing.experiments.stability import stability as stability
    from penjing.experiments.tune import tune as tune
    from penjing.experiments.tuned import Tuned as Tuned
    from penjing.language.checkpoint import quantize_checkpoint as quantize_checkpoint
    from penjing.language.checkpoint_delivery import QuantizedCheckpoint as QuantizedCheckpoint
    from penjing.language.codes import load_quantized as load_quantized
    from penjing.language.codes import read_codes as read_codes
    from penjing.measurement.measure import measure as measure
    from penjing.prune.alps import PruneALPS as PruneALPS
    from penjing.prune.blocks import RemoveBlocks as RemoveBlocks
    from penjing.prune.channels import PruneChannels as PruneChannels
    from penjing.prune.gradual import PruneGradually as PruneGradually
    from penjing.prune.kfac import PruneKFAC as PruneKFAC
    from penjing.prune.magnitude import PruneMagnitude as PruneMagnitude
    from penjing.prune.obc import PruneOBC as PruneOBC
    from penjing.prune.second_order import PruneSecondOrder as PruneSecondOrder
    from penjing.prune.sparsegpt import PruneSparseGPT as PruneSparseGPT
    from penjing.prune.transformer import PruneTransformer as PruneTransformer
    from penjing.prune.wanda import PruneWanda as PruneWanda
    from penjing.quantize.autoround import QuantizeAutoRound as QuantizeAutoRound
    from penjing.quantize.awq import QuantizeAWQ as QuantizeAWQ
    from penjing.quantize.embeddings import QuantizeEmbeddings as QuantizeEmbeddings
    from penjing.quantize.equalize import EqualizeWeights as EqualizeWeights
    from penjing.quantize.gptq import QuantizeGPTQ as QuantizeGPTQ
    from penjing.quantize.int8_dynamic import Int8Dynamic as Int8Dynamic
    from penjing.quantize.int8_static import Int8Static as Int8Static
    from penjing.quantize.nearest import QuantizeNearest as QuantizeNearest
    from penjing.quantize.reconstruct import QuantizeReconstruct as QuantizeReconstruct
    from penjing.quantize.smooth import SmoothActivations as SmoothActivations
    from penjing.quantize.train import TrainQuantized as TrainQuantized
    from penjing.quantize.weight_only import WeightOnly as WeightOnly
    from penjing.repair.batchnorm import ReestimateBatchNorm as ReestimateBatchNorm
    from penjing.repair.bias import CorrectBias as CorrectBias
    from penjing.repair.group_norm import ReplaceBatchNorm as ReplaceBatchNorm
    from penjing.repair.least_squares import LeastSquares as LeastSquares
    from penjing.repair.match_statistics import MatchStatistics as MatchStatistics
    from penjing.search.optimize import optimize as optimize
    from penjing.search.record import Result as Result
    from penjing.search.verify import verify as verify
    from penjing.train.finetune import FineTune as FineTune
    from penjing.train.strategy import Strategy as Strategy
