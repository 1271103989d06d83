"""`lemo.apply` and `lemo.remove`: one model instance trains through the engine, and is restored afterwards.

Two `forward` methods are covered on the instance (see `lemo.integration.entries`): the decoder's and the causal
language model's. Both step aside unless the module trains and gradients are on, so evaluation and `generate` run
transformers' own code.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn

from lemo.engine.checks import check_modules, check_randomness, loose_modules, trained_parameters
from lemo.engine.config import LemoConfig
from lemo.engine.families import UnsupportedModelError, find
from lemo.engine.linear import projection
from lemo.engine.loss import (
    Targets,
    auxiliary_loss,
    causal_lm_logits,
    causal_lm_loss,
    causal_lm_output,
    head_input,
    refuse_auxiliary_loss,
)
from lemo.engine.packing import Packed, pack
from lemo.engine.sequence import Group
from lemo.engine.step import Step
from lemo.engine.wrappers import base_model, sharded_tensor
from lemo.integration import trl_head
from lemo.integration.checks_peft import check_adapters, check_weights
from lemo.integration.checks_sequence import check_sequence
from lemo.integration.controller import Controller
from lemo.integration.entries import arguments, attach, controller_of, detach
from lemo.integration.training_pass import Inputs

if TYPE_CHECKING:  # loaded only if a run has a calibration
    from lemo.predictors.store import PredictorSet

_LOSS_OF_OTHERS = (
    'mode "skip" makes logits for a loss that lemo does not compute (label smoothing, a custom loss function). Tokens '
    "that were in no layer predict from their embedding alone, so a loss over them is too large, and lemo cannot keep "
    "the blocks that carry labels. Let the model compute the loss from labels, or use phases with an exact forward "
    'pass (mode "backward" or "dense")'
)

_TRANSFORMERS = (5, 6)  # from this major version, below that one


# --- the two forward methods ------------------------------------------------------------------------------------------


def _check_arguments(named: dict[str, Any]) -> None:
    for name in ("output_attentions", "output_hidden_states"):
        if named.get(name):
            raise ValueError(f"{name}=True is not available in training with lemo: call model.eval() or lemo.remove")
    # transformers names the argument `cache` from 5.24 on, and still takes the old name.
    if any(named.get(name) is not None for name in ("past_key_values", "cache")):
        raise ValueError(
            "past_key_values (cache) is not available in training with lemo: call model.eval() to generate; adapters "
            "that train them (prefix tuning, cartridges) are not supported"
        )
    if (named.get("input_ids") is None) == (named.get("inputs_embeds") is None):
        raise ValueError("expected exactly one of input_ids and inputs_embeds")


def _check_router(named: dict[str, Any], config: Any) -> None:
    given, own = named.get("output_router_logits"), getattr(config, "output_router_logits", None)
    if given is not None and own is not None and bool(given) != bool(own):
        raise ValueError(
            f"output_router_logits={given} is not available as an argument in training with lemo: set it in the "
            "model's configuration (the router's loss is part of the loss with True)"
        )


def _inputs(controller: Controller, named: dict[str, Any]) -> Inputs:
    ids, embeddings = named.get("input_ids"), named.get("inputs_embeds")
    given = ids if embeddings is None else embeddings
    assert given is not None
    if given.dim() != (2 if embeddings is None else 3):
        raise ValueError(f"input_ids must have shape [B, S], inputs_embeds [B, S, d]; got {list(given.shape)}")
    packed = pack(
        controller.family,
        (given.shape[0], given.shape[1]),
        given.device,
        controller.config.block_size,
        named.get("attention_mask"),
        named.get("position_ids"),
        named,
    )
    return Inputs(packed, ids, embeddings)


def _decoder_forward(
    controller: Controller, module: nn.Module, original: Callable[..., Any], args: Any, kwargs: Any
) -> Any:
    controller.cover_heads()
    if controller.sequence is not None and not controller.referring:
        _refuse_rows_of_others()
    named = arguments(module, args, kwargs)
    _check_arguments(named)
    inputs = _inputs(controller, named)
    x, step = controller.run(inputs)
    if torch.is_grad_enabled():
        refuse_auxiliary_loss(step, controller.model.config)
    with step.weights.outside(*controller.family.final_modules(module)):
        x = head_input(x, controller.family.final_norm(module), controller.family.project_out(module), step)
    output = controller.family.decoder_output(inputs.packed.put(x))
    return output.to_tuple() if named.get("return_dict") is False else output


def _causal_lm_forward(
    controller: Controller, module: Any, original: Callable[..., Any], args: Any, kwargs: Any
) -> Any:
    if controller.referring:  # the decoder below repeats the lists; the head may be anyone's
        return original(*args, **kwargs)
    named = arguments(module, args, kwargs)
    _check_arguments(named)
    _check_router(named, module.config)
    fused = trl_head.wanted(controller, module, original, kwargs)
    if fused is not None and controller.sequence is not None:
        _refuse_rows_of_others()
    if fused is not None and any(sharded_tensor(p) for p in module.lm_head.parameters()):
        raise ValueError(
            "the fused loss of TRL reads the whole head, which FSDP2 divides: leave the head and the final norm in the "
            "group of the model itself (fully_shard on the layers and the model alone), or train without the fused loss"
        )
    if fused is not None:
        return trl_head.fused_output(controller, module, fused, named, _inputs(controller, named))
    if kwargs.get("fused_lm_head"):
        return original(*args, **kwargs)
    keep = named.get("logits_to_keep", 0)
    ordinary = isinstance(keep, int) and keep == 0 and getattr(module, "_loss_function", None) is None
    if named.get("labels") is None or not ordinary:
        # Only the layers run through lemo then.
        if controller.phase.skips:
            controller.note(_LOSS_OF_OTHERS)
        return original(*args, **kwargs)
    inputs = _inputs(controller, named)
    targets = Targets.of(inputs.packed, named)
    labelled = targets.values != targets.ignore_index
    x, step = controller.run(replace(inputs, labelled=labelled, targets=targets.values))
    targets = targets.of_share(step.share)
    decoder = controller.family.decoder(module)
    with step.weights.outside(*controller.family.final_modules(decoder), module.lm_head):
        loss, count, logits = _loss(controller, module, x, targets, step, inputs.packed)
    extra = auxiliary_loss(step, module.config)
    if extra is not None:
        loss = loss + extra
    controller.count_loss_tokens(count)
    return causal_lm_output(loss, logits, named.get("return_dict"))


def _loss(
    controller: Controller, module: Any, x: Tensor, targets: Targets, step: Step, packed: Packed
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Loss of the residual stream after the last layer, the number of targets it is over, and the logits if asked
    for."""
    decoder = controller.family.decoder(module)
    norm, project = controller.family.head_norm(decoder), controller.family.project_out(decoder)
    head = projection(module.lm_head, head=True)
    if head is None:
        controller.note(
            f"lm_head is a {type(module.lm_head).__name__} that the segmented loss does not cover: logits are whole"
        )
    softcap = controller.family.logit_softcap(module.config)
    if controller.sequence is not None and (head is None or controller.config.return_logits):
        _refuse_rows_of_others()
    if head is None or controller.config.return_logits:
        return causal_lm_logits(x, norm, module.lm_head, targets, step, packed, project=project, softcap=softcap)
    rows = controller.config.segment_rows
    loss, count = causal_lm_loss(x, norm, head, targets, step, project=project, segment_rows=rows, softcap=softcap)
    return loss, count, None


def _refuse_rows_of_others() -> NoReturn:
    raise ValueError(
        "sequence_group: each process holds the rows of its own tokens, so hidden states and logits of the whole batch "
        "do not exist. Call the model with labels and use its loss; leave return_logits, fused losses of other "
        "libraries and heads that are not linear layers out"
    )


def _check_version() -> None:
    version = importlib.metadata.version("transformers")
    if not _TRANSFORMERS[0] <= int(version.split(".")[0]) < _TRANSFORMERS[1]:
        raise UnsupportedModelError(
            f"lemo supports transformers from {_TRANSFORMERS[0]}.0 and below {_TRANSFORMERS[1]}.0; installed is "
            f"{version}"
        )


def _predictors(inner: nn.Module, config: LemoConfig) -> PredictorSet | None:
    if config.calibration is None:
        return None
    from lemo.predictors.store import PredictorSet

    predictors = PredictorSet.load(config.calibration, model=inner)
    used = False
    for phase in config.phases or ():
        policy, options = config.policy(phase)
        if phase.chooses_blocks and (
            policy == "predictors" or (policy == "sampled" and options.get("source", "predictors") == "predictors")
        ):
            predictors.require("importance", config.calibration, f"policy {policy!r} in mode {phase.mode!r}")
            used = True
        if phase.mode == "sparse" and phase.tile_policy == "predictors":
            predictors.require("mass", config.calibration, 'tile_policy "predictors" in mode "sparse"')
            used = True
    if not used and any(phase.mode == "sparse" for phase in config.phases or ()):
        how = (
            'Phase("sparse", tile_policy="predictors")'
            if predictors.target == "mass"
            else 'Phase("sparse", keep=0.5, policy="predictors")'
        )
        raise ValueError(
            f"LemoConfig.calibration is {config.calibration}, but no phase uses its predictors, which were made with "
            f"--target {predictors.target}: name them, as in {how}, or leave the calibration out"
        )
    if predictors.target == "importance" and predictors.block_size != config.block_size:
        raise ValueError(
            f"LemoConfig.block_size is {config.block_size}, but {config.calibration} was calibrated for blocks of "
            f"{predictors.block_size} tokens: use that size or calibrate again"
        )
    return predictors


def apply(model: nn.Module, config: LemoConfig | None = None, *, sequence_group: Any = None) -> Controller:
    """Lets `model` train with token elimination, in place; `remove` undoes it.

    model: a causal language model of transformers of a family that lemo knows (docs/guide/models.md), before or after
    PEFT wraps it. sequence_group: processes (a ProcessGroup of torch.distributed) that share every batch: each is given
    all of it, and computes its part of the tokens. Loss and gradients are those of one process with the batch.
    Raises UnsupportedModelError (a ValueError) for other models and versions of transformers, ValueError if lemo is
    already applied or the settings do not fit, CalibrationError for a calibration of another model. The model is then
    unchanged.
    """
    config = LemoConfig() if config is None else config
    if not isinstance(config, LemoConfig):
        raise ValueError(f"config must be a lemo.LemoConfig; got {type(config).__name__}")
    _check_version()
    family, inner = find(model)
    check_adapters(model)
    decoder = family.decoder(inner)
    layers = family.layers(decoder)
    check_weights(layers)
    check_modules(family, inner)
    trained_parameters(family, decoder)
    check_randomness(family, inner, loose_modules(family, layers), config.phases or ())
    if controller_of(inner) is not None:
        raise ValueError("lemo is already applied to this model; call lemo.remove(model) first")
    devices = {p.device for p in decoder.parameters()}
    if len(devices) > 1:
        names = ", ".join(sorted(str(d) for d in devices))
        raise UnsupportedModelError(
            f"lemo needs the whole model on one device; its weights are on {names}: load it without a device_map, or "
            'with device_map={"": 0}'
        )
    config.check_layers(len(layers))
    group = None if sequence_group is None else Group.of(sequence_group)
    if group is not None:
        check_sequence(group, family, inner, config)
    controller = Controller(family, inner, config, _predictors(inner, config), group)
    attach(decoder, controller, _decoder_forward)
    attach(inner, controller, _causal_lm_forward)
    controller.cover_heads()
    return controller


def remove(model: Any) -> None:
    """Restores the forward methods of `model`. Raises ValueError if lemo is not applied to it."""
    inner = base_model(model)
    controller = controller_of(inner)
    if not isinstance(controller, Controller):
        raise ValueError("lemo is not applied to this model; nothing to remove")
    controller.warn_of_unreached()
    controller.graphs.clear()
    detach(controller.family.decoder(inner))
    detach(inner)
