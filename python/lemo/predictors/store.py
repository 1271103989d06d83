"""Calibrated predictors on disk: one folder with ``lemo_config.json`` and ``predictors.safetensors``.

The folder is complete or absent (see `lemo.storage`). The configuration names the format, every layer's sizes, the
model the predictors were trained for, and the size and digest of the weight file, so that a damaged or exchanged file
is noticed when it is read.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lemo import storage
from lemo.engine.families.base import NormKind
from lemo.engine.layout import Blocks
from lemo.engine.sequence import Share
from lemo.engine.tiles import TILE
from lemo.predictors.fingerprint import differences, model_fingerprint
from lemo.predictors.network import NORMS, POOLS, WEIGHT_NAMES, LayerWeights, Pool, informativeness
from lemo.predictors.tiles import TileStrips
from lemo.storage import content_digest, file_digest, replaced_name

CONFIG_NAME = "lemo_config.json"
WEIGHTS_NAME = "predictors.safetensors"
FORMAT_VERSION = 2  # version 1 had no target: "importance"
_READABLE = (1, 2)
Target = Literal["importance", "mass"]
_USES = {"importance": "the choice of blocks", "mass": "the choice of key tiles"}


class CalibrationError(RuntimeError):
    """A calibration folder cannot be written or read, or belongs to another model. Nothing was changed."""


def check_target(target: Path, overwrite: bool) -> None:
    """Raises CalibrationError for a folder that a calibration cannot be saved to."""
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        if not overwrite:
            raise CalibrationError(f"{target} exists already: choose another folder or allow overwriting it")
        if not (target / CONFIG_NAME).is_file():
            raise CalibrationError(f"{target} holds no {CONFIG_NAME}, so it is not a calibration: not overwritten")


@dataclass(eq=False)
class PredictorSet:
    """The predictors of every layer of one model, with the layers' thresholds and budgets.

    layers: weights per layer; norm, pool, eps, normalize: as in ``lemo.ops.predict``; block_size: tokens per block;
    thresholds: per layer, keep blocks with at least this predicted score; keep: per layer, share of blocks as a budget;
    context: tokens per document in training (thresholds of plain column sums grow with it); fingerprint: the model's;
    report: what calibration measured (JSON values).
    target: what they predict, the "importance" of blocks or the attention "mass" of key tiles, whose blocks have 128
    tokens; distances: with "mass", float32 [layers, P], see ``lemo.predictors.tiles.distance_logits``.
    """

    layers: Sequence[LayerWeights]
    norm: NormKind
    pool: Pool
    eps: float
    normalize: bool
    thresholds: tuple[float, ...]
    keep: tuple[float, ...]
    block_size: int
    context: int
    fingerprint: dict[str, Any]
    report: dict[str, Any] = field(default_factory=dict)
    target: Target = "importance"
    distances: Tensor | None = None

    def __post_init__(self) -> None:
        self.layers, self.thresholds, self.keep = tuple(self.layers), tuple(self.thresholds), tuple(self.keep)
        n = len(self.layers)
        if self.target == "mass":
            if self.block_size != TILE:
                raise ValueError(f'block_size: target "mass" is about tiles of {TILE} tokens, got {self.block_size}')
            shape = None if self.distances is None else tuple(self.distances.shape)
            if shape is None or len(shape) != 2 or shape[0] != n or shape[1] < 3:
                raise ValueError(f"distances: expected a row of at least 3 numbers for each of {n} layers, got {shape}")
        for name in ("thresholds", "keep"):
            if len(getattr(self, name)) != n:
                raise ValueError(f"{name}: expected one value for each of {n} layers, got {len(getattr(self, name))}")

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def num_parameters(self) -> int:
        return sum(layer.num_parameters for layer in self.layers)

    @property
    def calibrated_keep(self) -> float:
        """The share of blocks that the calibration aimed to keep, to which thresholds and budgets belong."""
        return _calibrated_keep(self.keep, self.report)

    def scores(self, layer: int, x: Tensor, blocks: Blocks, share: Share | None = None) -> Tensor:
        """Predicted informativeness float32 [nb] of layer ``layer`` from residual rows x [T, d] (the layer's input).

        share: what this process holds of the blocks, if several share them; x is then of its own tokens.
        """
        self.require("importance")
        if blocks.block_size != self.block_size:
            raise ValueError(
                f"blocks: the predictors were calibrated for blocks of {self.block_size} tokens, got "
                f"{blocks.block_size}; calibrate again with that block size"
            )
        if share is None:
            return self._predict(layer, x, blocks)[0]
        # A block's score depends on all later ones of its document: vectors are gathered, not scores.
        queries, keys = (share.gather(vectors) for vectors in self._predict(layer, x, share.own)[1:])
        return informativeness(queries, keys, blocks, self.normalize)

    def tile_scores(self, layer: int, x: Tensor, blocks: Blocks) -> TileStrips:
        """Predicted attention mass of layer ``layer`` from residual rows x [T, d] (the layer's input), a strip of query
        tiles at a time: ``strip(first_slot, slots, width)`` gives float32 [slots, width].

        blocks: of 128 tokens. The networks run once, in this call.
        """
        self.require("mass")
        if blocks.block_size != TILE:
            raise ValueError(f"blocks: expected tiles of {TILE} tokens, got blocks of {blocks.block_size}")
        if x.shape[0] != blocks.num_tokens:
            raise ValueError(f"x: expected the {blocks.num_tokens} rows of the blocks, got {x.shape[0]}")
        assert self.distances is not None
        _, queries, keys = self._predict(layer, x, blocks)
        return TileStrips(queries, keys, self.distances[layer], blocks)

    def require(self, target: Target, folder: str | os.PathLike[str] | None = None, where: str | None = None) -> None:
        """Raises CalibrationError unless the predictors were calibrated for this target. where: what needs it."""
        if self.target != target:
            which = "the calibration" if folder is None else os.fspath(folder)
            raise CalibrationError(
                f"{which} was made for {_USES[self.target]} (--target {self.target}), but {where or _USES[target]} "
                f"needs --target {target}: run `lemo calibrate --target {target}`, or choose another policy"
            )

    def _predict(self, layer: int, x: Tensor, blocks: Blocks) -> tuple[Tensor, Tensor, Tensor]:
        """Scores [nb], queries and keys [nb, c], float32."""
        from lemo import ops

        weights = self.layers[layer]
        with torch.no_grad():
            return ops.predict(
                x.detach(),
                weights.wq1,
                weights.wq2,
                weights.wq3,
                weights.wk1,
                weights.wk2,
                weights.wk3,
                blocks.offsets,
                blocks.documents,
                blocks.block_size,
                self.norm,
                self.pool,
                self.eps,
                self.normalize,
            )

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> PredictorSet:
        """The same predictors on another device or in another type (float32 on CPU, float16 or bfloat16 on CUDA)."""
        layers = tuple(layer.to(device=device, dtype=dtype) for layer in self.layers)
        distances = None if self.distances is None else self.distances.to(device=device)
        return PredictorSet(**{**self.__dict__, "layers": layers, "distances": distances})

    def check_model(self, model: nn.Module) -> None:
        """Raises CalibrationError, naming what differs, unless the predictors were calibrated for this model."""
        _compare(self.fingerprint, model_fingerprint(model))

    # ---- writing -----------------------------------------------------------------------------------------------------

    def save(self, folder: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Writes the folder completely or not at all.

        An existing folder is an error unless ``overwrite``; then it must be a calibration (or empty), and it stays as
        it was until the new one is complete. Raises CalibrationError if it cannot be written.
        """
        target = Path(folder)
        check_target(target, overwrite)
        try:
            storage.write_folder(target, self._write, overwrite=True)
        except Exception as error:
            raise CalibrationError(f"cannot write {target}: {_reason(error)}; nothing was changed") from error

    def _write(self, folder: Path) -> None:
        from safetensors.torch import save_file

        tensors = {
            f"layers.{i}.{name}": weight.float().cpu().contiguous()
            for i, layer in enumerate(self.layers)
            for name, weight in zip(WEIGHT_NAMES, layer, strict=True)
        }
        path = folder / WEIGHTS_NAME
        save_file(tensors, path, metadata={"format": "pt"})
        config: dict[str, Any] = {
            "format_version": FORMAT_VERSION,
            "target": self.target,
            "block_size": self.block_size,
            "context": self.context,
            "norm": self.norm,
            "pool": self.pool,
            "eps": self.eps,
            "normalize": self.normalize,
            "thresholds": list(self.thresholds),
            "keep": list(self.keep),
            "sizes": [[list(w.shape) for w in layer] for layer in self.layers],
            "weights": {"bytes": path.stat().st_size, "sha256": file_digest(path)},
            "model": self.fingerprint,
            "report": self.report,
        }
        if self.distances is not None:
            config["distances"] = self.distances.float().cpu().tolist()
        config["digest"] = content_digest(config)
        (folder / CONFIG_NAME).write_text(json.dumps(config, indent=1) + "\n")

    # ---- reading -----------------------------------------------------------------------------------------------------

    @classmethod
    def load(
        cls,
        folder: str | os.PathLike[str],
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        model: nn.Module | None = None,
    ) -> PredictorSet:
        """Reads a calibration folder; with ``model``, also checks that it was made for that model.

        dtype: of the weights, default float32 on the CPU and bfloat16 elsewhere. Raises CalibrationError for a missing,
        damaged or foreign file.
        """
        folder = Path(folder)
        config = _read_config(folder)
        if model is not None:  # before the weights: sizes of another model would be reported as damage
            _compare(config["model"], model_fingerprint(model))
        weights = _read_weights(folder, config)
        layers = []
        for i, sizes in enumerate(config["sizes"]):
            layer = []
            for name, shape in zip(WEIGHT_NAMES, sizes, strict=True):
                weight = weights.get(f"layers.{i}.{name}")
                if weight is None or list(weight.shape) != shape:
                    got = "nothing" if weight is None else list(weight.shape)
                    path = folder / WEIGHTS_NAME
                    raise CalibrationError(
                        f"{path}: layers.{i}.{name}: expected shape {shape}, got {got}: calibrate again"
                    )
                layer.append(weight)
            layers.append(LayerWeights(*layer))
        _check_digest(folder, config)
        predictors = cls(
            layers=layers,
            norm=config["norm"],
            pool=config["pool"],
            eps=config["eps"],
            normalize=config["normalize"],
            thresholds=config["thresholds"],
            keep=config["keep"],
            block_size=config["block_size"],
            context=config["context"],
            fingerprint=config["model"],
            report=config.get("report", {}),
            target=config["target"],
            distances=torch.tensor(config["distances"]) if config["target"] == "mass" else None,
        )
        if dtype is None:
            dtype = torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16
        return predictors.to(device=device, dtype=dtype)


def check_calibrated_for(folder: str | os.PathLike[str], fingerprint: dict[str, Any]) -> None:
    """Raises CalibrationError, naming what differs, unless a calibration was made for the model of this fingerprint:
    its `model_fingerprint`, or `config_fingerprint`, which knows shapes and no weights. Reads no weights."""
    config = _read_config(Path(folder))
    _check_digest(Path(folder), config)
    _compare(config["model"], fingerprint)


def calibrated_with(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """{"target", "context", "block_size", "keep"} with which a calibration was made; with target "mass", whose tiles
    are not blocks, the last two are None. Reads no weights. Raises CalibrationError."""
    config = _read_config(Path(folder))
    _check_digest(Path(folder), config)  # here nothing else would tell a number that was changed
    blocks = config["target"] == "importance"
    return {
        "target": config["target"],
        "context": config["context"],
        "block_size": config["block_size"] if blocks else None,
        "keep": _calibrated_keep(config["keep"], config.get("report")) if blocks else None,
    }


def _calibrated_keep(keep: Sequence[float], report: Any) -> float:
    aimed = report.get("keep") if isinstance(report, dict) else None
    return float(aimed) if isinstance(aimed, (int, float)) else sum(keep) / len(keep)


def calibration_digest(folder: str | os.PathLike[str]) -> str:
    """Hex digest of the content of a calibration folder. Raises CalibrationError if it is not complete."""
    folder = Path(folder)
    config = _read_config(folder)
    _read_weights(folder, config)
    _check_digest(folder, config)
    return hashlib.sha256((file_digest(folder / CONFIG_NAME) + file_digest(folder / WEIGHTS_NAME)).encode()).hexdigest()


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_NAME
    if not folder.is_dir():
        hint = "run `lemo calibrate` first"
        if replaced_name(folder).is_dir():
            hint = f"an interrupted overwrite left the previous one at {replaced_name(folder)}"
        raise CalibrationError(f"calibration folder {folder} does not exist: {hint}")
    try:
        config = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise CalibrationError(f"{folder}: {CONFIG_NAME} is missing: not a folder of `lemo calibrate`") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CalibrationError(f"{path} cannot be read ({error}): calibrate again") from None
    version = config.get("format_version") if isinstance(config, dict) else None
    if version not in _READABLE:
        raise CalibrationError(
            f"{path}: written in format version {version}, this lemo reads versions {_READABLE[0]} to {_READABLE[-1]}: "
            "calibrate again or use the lemo that wrote it"
        )
    number, whole, per_layer = (int, float), int, list
    expected: dict[str, Any] = {
        "block_size": whole,
        "context": whole,
        "norm": str,
        "pool": str,
        "eps": number,
        "normalize": bool,
        "thresholds": per_layer,
        "keep": per_layer,
        "sizes": per_layer,
        "weights": dict,
        "model": dict,
    }
    for name, kind in expected.items():
        if not isinstance(config.get(name), kind):
            raise CalibrationError(f"{path}: {name} is missing or of the wrong kind: calibrate again")
    if not len(config["sizes"]) == len(config["thresholds"]) == len(config["keep"]):
        raise CalibrationError(f"{path}: sizes, thresholds and keep differ in their number of layers: calibrate again")
    if not config["sizes"]:
        raise CalibrationError(f"{path}: there are no layers in it: calibrate again")
    if config["norm"] not in NORMS or config["pool"] not in POOLS:
        raise CalibrationError(f"{path}: unknown norm {config['norm']!r} or pool {config['pool']!r}: calibrate again")
    if not _has_shapes(config["sizes"]) or not all(
        isinstance(v, number) for v in config["thresholds"] + config["keep"]
    ):
        raise CalibrationError(f"{path}: sizes, thresholds or keep hold something other than numbers: calibrate again")
    _check_calibrated_for(path, config)
    return config


def _check_calibrated_for(path: Path, config: dict[str, Any]) -> None:
    """The target and what belongs to it. Version 1 has no target, which may therefore be set here."""
    target = "importance" if config["format_version"] == 1 else config.get("target")
    if target not in _USES:
        raise CalibrationError(f"{path}: unknown target {target!r}, expected {' or '.join(_USES)}: calibrate again")
    config["target"] = target
    if target == "importance":
        return
    rows = config.get("distances")
    if config["block_size"] != TILE:
        raise CalibrationError(f"{path}: target mass with tiles of {config['block_size']}, expected {TILE}")
    if not (
        isinstance(rows, list)
        and len(rows) == len(config["sizes"])
        and all(isinstance(row, list) and len(row) == len(rows[0]) >= 3 for row in rows)
        and all(isinstance(v, (int, float)) for row in rows for v in row)
    ):
        raise CalibrationError(f"{path}: distances is missing or of the wrong kind: calibrate again")


def _check_digest(folder: Path, config: dict[str, Any]) -> None:
    """After the checks with more specific messages. The first calibrations of format 1 have no digest."""
    written = {k: v for k, v in config.items() if k != "target" or config["format_version"] != 1}
    if "digest" in config and config["digest"] != content_digest(written):
        path = folder / CONFIG_NAME
        raise CalibrationError(f"{path} is not what was written (its own digest differs): calibrate again")


def _has_shapes(sizes: list[Any]) -> bool:
    """Whether every layer has a shape, a list of whole numbers, for every weight."""
    layers = [layer for layer in sizes if isinstance(layer, list) and len(layer) == len(WEIGHT_NAMES)]
    shapes = [shape for layer in layers for shape in layer]
    return len(layers) == len(sizes) and all(isinstance(s, list) and all(isinstance(n, int) for n in s) for s in shapes)


def _read_weights(folder: Path, config: dict[str, Any]) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path, expected = folder / WEIGHTS_NAME, config["weights"]
    if not path.is_file():
        raise CalibrationError(f"{folder}: {WEIGHTS_NAME} is missing: calibrate again or copy the whole folder")
    size = path.stat().st_size
    if size != expected.get("bytes"):
        raise CalibrationError(
            f"{path} is truncated or was exchanged: expected {expected.get('bytes')} bytes, got {size}; calibrate again"
        )
    if file_digest(path) != expected.get("sha256"):
        raise CalibrationError(f"{path} is not what was written (its digest differs): calibrate again")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CalibrationError(f"{path} cannot be read ({error}): calibrate again") from None


def _compare(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    found = differences(ours, theirs, "calibrated for")
    if found:
        raise CalibrationError(
            f"the calibration belongs to another model ({'; '.join(found)}): run `lemo calibrate` for this one"
        )


def _reason(error: BaseException) -> str:
    return f"no space left on the disk ({error})" if storage.is_disk_full(error) else str(error)
