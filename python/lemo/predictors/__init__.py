"""Predictors of what attention looks at, blocks or key tiles: networks, training on a frozen model, folder on disk."""

from lemo.predictors.calibration import CalibrationSettings, calibrate
from lemo.predictors.fingerprint import model_fingerprint
from lemo.predictors.mass import evaluate_coverage, format_coverage
from lemo.predictors.network import LayerWeights, PredictorNetwork
from lemo.predictors.report import evaluate_recall, format_report, plot_report
from lemo.predictors.store import CalibrationError, PredictorSet

__all__ = [
    "CalibrationError",
    "CalibrationSettings",
    "LayerWeights",
    "PredictorNetwork",
    "PredictorSet",
    "calibrate",
    "evaluate_coverage",
    "evaluate_recall",
    "format_coverage",
    "format_report",
    "model_fingerprint",
    "plot_report",
]
