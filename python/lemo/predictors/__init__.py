"""Predictors of block informativeness: the networks, their training on a frozen model, and their folder on disk."""

from lemo.predictors.fingerprint import model_fingerprint
from lemo.predictors.network import LayerWeights, PredictorNetwork
from lemo.predictors.store import CalibrationError, PredictorSet

__all__ = ["CalibrationError", "LayerWeights", "PredictorNetwork", "PredictorSet", "model_fingerprint"]
