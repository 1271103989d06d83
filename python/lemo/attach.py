"""`lemo.apply` and `lemo.remove`: one model instance trains through the engine, and is as it was afterwards.

Two `forward` methods are replaced on the instance: the decoder's and the causal language model's. Both step aside
unless the module trains and gradients are on, so evaluation and `generate` run transformers' own code.
"""

from __future__ import annotations

import functools
import importlib.metadata
import inspect
import logging
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from . import ops
from .checks import check_modules, check_randomness, loose_modules, trained_parameters
from .config import LemoConfig, Phase
from .engine import Stack, Step
from .families import UnsupportedModelError, find
from .families.base import Family
from .layout import Kept
from .lora import ordinary, projection
from .loss import causal_lm_loss, shift
from .packing import Packed, pack
from .policies import Policy, StepContext, make_policy, mix_seed
from .schedule import LemoCallback, Schedule

logger = logging.getLogger(__name__)

_TRANSFORMERS = (5, 6)  # from this major version, below that one


class Controller:
    """Steers a model that lemo was applied to, and tells what it does.

    total_steps: optimizer steps of the run; set it in a loop of your own if the schedule has several phases (the
    Trainer's callback does it for you). kept_ratios, mlp_kept_ratios: of the last forward pass, kept blocks over all
    blocks, by layer.
    """

    def __init__(self, family: Family, model: Any, config: LemoConfig, predictors: Any) -> None:
        self.family, self.model, self.config, self.predictors = family, model, config, predictors
        self.schedule = Schedule(config.phases or ())
        self.total_steps: int | None = None
        self.step_index = 0
        self.micro_batch = 0
        self.kept_ratios: list[float] = []
        self.mlp_kept_ratios: list[float] = []
        self._tokens = self._blocks = 0
        self._last_phase: int | None = None
        self._policies: list[Policy | None] = [
            None if p.mode == "dense" else make_policy(*config.policy(p), predictors) for p in self.schedule.phases
        ]
        self._notes: set[str] = set()

    # --- progress ---

    def step(self) -> None:
        """One optimizer step is done. Call it in a loop of your own after `optimizer.step()`."""
        self.seek(self.step_index + 1)

    def seek(self, step: int) -> None:
        """Continues at optimizer step `step` (from 0), as after a resume."""
        if step < 0:
            raise ValueError(f"step must not be negative; got {step}")
        self.step_index, self.micro_batch = int(step), 0

    def callback(self) -> LemoCallback:
        """The callback that moves this controller under the transformers Trainer."""
        return LemoCallback(self)

    @property
    def phase(self) -> Phase:
        """The phase of the coming step."""
        return self.schedule.phase(self.step_index, self.total_steps)

    def report(self) -> dict[str, Any]:
        """The last forward pass in plain values, for logs."""
        index = self._last_phase
        phase = None if index is None else self.schedule.phases[index]
        return {
            "step": self.step_index,
            "phase": index,
            "mode": None if phase is None else phase.mode,
            "keep": None if phase is None else phase.keep,
            "policy": None if phase is None or phase.mode == "dense" else self.config.policy(phase)[0],
            "tokens": self._tokens,
            "blocks": self._blocks,
            "kept": list(self.kept_ratios),
            "mlp_kept": list(self.mlp_kept_ratios),
        }

    def warn_of_unreached(self) -> None:
        """Says which phases a run that ends now never reached (early stopping)."""
        last, total = self._last_phase, self.total_steps
        if last is None or total is None:
            return
        for i, steps in enumerate(self.schedule.steps(total)):
            if i > last and steps > 0:
                self._note(
                    f"training ended in phase {last} ({self.schedule.phases[last].mode}): phase {i} "
                    f"({self.schedule.phases[i].mode}, {steps} of {total} steps) was never reached"
                )

    def _warn_of_empty_phases(self) -> None:
        total = self.total_steps
        if total is None or len(self.schedule.phases) == 1:
            return
        for i, steps in enumerate(self.schedule.steps(total)):
            if steps == 0:
                phase = self.schedule.phases[i]
                self._note(
                    f"phase {i} ({phase.mode}) has none of the run's {total} steps: with a share of {phase.share:g} it "
                    "needs a longer run, or a larger share"
                )

    # --- one training forward pass ---

    def run(self, packed: Packed, ids: Tensor | None, embeddings: Tensor | None) -> tuple[Tensor, Step]:
        """The residual stream [T, d] after the last layer, before the final norm."""
        family, decoder = self.family, self.family.decoder(self.model)
        check_modules(family, self.model)
        layers = family.layers(decoder)[: self.model.config.num_hidden_layers]
        params, loose = trained_parameters(family, layers), loose_modules(family, layers)
        index = self.schedule.index(self.step_index, self.total_steps)
        self._warn_of_empty_phases()
        random = check_randomness(family, self.model, loose, self.schedule.phases[index:])
        # Only a plain embedding's output is ours to update in place.
        plain = ordinary(decoder.embed_tokens, "torch.nn.modules.sparse.Embedding")
        x = family.embed(decoder, ids, embeddings, packed.positions)
        x = x.to(self._compute_dtype(x))
        phase, policy = self.schedule.phases[index], self._policies[index]
        tables = family.tables(decoder, x.detach(), packed.positions)
        everything = Kept.everything(packed.blocks)
        if policy is not None:
            policy.begin(self._step_context(packed, phase, layers, tables))
        self.micro_batch += 1
        self.kept_ratios, self.mlp_kept_ratios = [], []
        self._tokens, self._blocks, self._last_phase = packed.blocks.num_tokens, packed.blocks.num_blocks, index

        def choose(i: int, rows: Tensor) -> tuple[Kept | None, Kept | None]:
            if policy is None or (self.config.layers is not None and i not in self.config.layers):
                kept: tuple[Kept | None, Kept | None] = (everything, everything)
            else:
                shared, mlp = policy.choose(i, rows)
                # One object for all that keep everything, so that its tensors exist once.
                shared_all = shared is not None and shared.is_everything
                mlp_all = mlp is not None and mlp.is_everything
                kept = (everything if shared_all else shared, everything if mlp_all else mlp)
            for ratios, part in zip((self.kept_ratios, self.mlp_kept_ratios), kept, strict=True):
                ratios.append(0.0 if part is None else part.num_blocks / packed.blocks.num_blocks)
            return kept

        # Nothing is eliminated: the exact layers, with what `recompute` says. (Mode "backward" over everything too.)
        step = Step(
            family=family,
            layers=layers,
            blocks=packed.blocks,
            tables=tables,
            mode=phase.mode,
            recompute=self._recompute(),
            weighted=phase.weighted,
            deterministic=self.config.deterministic,
            random=random,
            general=bool(loose),
            choose=choose,
            observe=policy.observe if policy is not None and policy.needs_update else None,
            borrowed=embeddings is not None or x.requires_grad or not plain,
            autocast=self._autocast(x),
        )
        return Stack.apply(x, step, *params), step

    def _step_context(self, packed: Packed, phase: Phase, layers: list[nn.Module], tables: Any) -> StepContext:
        def queries_keys(i: int, x: Tensor) -> tuple[Tensor, Tensor]:
            n = self.family.norms(layers[i])[0]
            h, _ = ops.gather_norm(x, None, None, *n.contiguous, n.kind, n.eps)
            return self.family.queries_keys_values(layers[i], h, tables, None)[:2]

        return StepContext(
            blocks=packed.blocks,
            phase=phase,
            seed=mix_seed(self.config.seed, self.step_index, self.micro_batch),
            always_first=self.config.always_first,
            always_last=self.config.always_last,
            queries_keys=queries_keys,
            scale=lambda i: self.family.scale(layers[i]),
        )

    def _recompute(self) -> str:
        wanted = any(getattr(m, "gradient_checkpointing", False) for m in self.model.modules())
        if self.config.recompute == "auto":
            return "full" if wanted else "none"
        if wanted:
            self._note(
                f"gradient checkpointing is switched on in the model; lemo runs the layers itself, with "
                f'recompute="{self.config.recompute}"'
            )
        return self.config.recompute

    def _note(self, text: str) -> None:
        if text not in self._notes:
            self._notes.add(text)
            logger.warning(text)

    @staticmethod
    def _compute_dtype(x: Tensor) -> torch.dtype:
        if not x.is_cuda:
            if x.dtype != torch.float32:
                raise ValueError(
                    f"lemo computes in float32 on the CPU; the model's embeddings are {x.dtype}: call model.float()"
                )
            return torch.float32
        dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else x.dtype
        if dtype not in (torch.float16, torch.bfloat16):
            raise ValueError(
                f"lemo computes in float16 or bfloat16 on CUDA; the model's embeddings are {dtype}: load the model "
                "with dtype=torch.bfloat16 or train under torch.autocast"
            )
        return dtype

    @staticmethod
    def _autocast(x: Tensor) -> tuple[str, torch.dtype, bool]:
        # On the CPU everything is fp32: autocast is switched off inside the stack, whatever it was.
        return x.device.type, x.dtype if x.is_cuda else torch.bfloat16, x.is_cuda and torch.is_autocast_enabled("cuda")


# --- the two forward methods ------------------------------------------------------------------------------------------


def _arguments(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments by name, those of **kwargs included."""
    bound = inspect.signature(module.forward).bind_partial(*args, **kwargs)
    named = dict(bound.arguments)
    named.update(named.pop("kwargs", {}))
    return named


def _check_arguments(named: dict[str, Any]) -> None:
    for name in ("output_attentions", "output_hidden_states"):
        if named.get(name):
            raise ValueError(f"{name}=True is not available in training with lemo: call model.eval() or lemo.remove")
    if named.get("past_key_values") is not None:
        raise ValueError("past_key_values is not available in training with lemo: call model.eval() to generate")
    if (named.get("input_ids") is None) == (named.get("inputs_embeds") is None):
        raise ValueError("expected exactly one of input_ids and inputs_embeds")


def _packed(controller: Controller, named: dict[str, Any]) -> tuple[Packed, Tensor | None, Tensor | None]:
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
    return packed, None if ids is None else packed.take(ids), None if embeddings is None else packed.take(embeddings)


def _decoder_forward(
    controller: Controller, module: nn.Module, original: Callable[..., Any], args: Any, kwargs: Any
) -> Any:
    from transformers.modeling_outputs import BaseModelOutputWithPast

    named = _arguments(module, args, kwargs)
    _check_arguments(named)
    packed, ids, embeddings = _packed(controller, named)
    x, _ = controller.run(packed, ids, embeddings)
    n = controller.family.final_norm(module)
    if n is not None:
        x = ops.norm(x, *n.contiguous, n.kind, n.eps)
    output = BaseModelOutputWithPast(last_hidden_state=packed.put(x))
    return output.to_tuple() if named.get("return_dict") is False else output


def _causal_lm_forward(
    controller: Controller, module: nn.Module, original: Callable[..., Any], args: Any, kwargs: Any
) -> Any:
    from transformers.modeling_outputs import CausalLMOutputWithPast

    named = _arguments(module, args, kwargs)
    _check_arguments(named)
    labels, shifted = named.get("labels"), named.get("shift_labels")
    head = projection(module.lm_head, trainable=True)
    keep = named.get("logits_to_keep", 0)
    ordinary = isinstance(keep, int) and keep == 0 and getattr(module, "_loss_function", None) is None
    if labels is None or head is None or not ordinary:
        if labels is not None and ordinary:
            controller._note(
                f"lm_head is a {type(module.lm_head).__name__} that the segmented loss does not cover: logits are whole"
            )
        # Only the layers run through lemo then.
        return original(*args, **kwargs)
    packed, ids, embeddings = _packed(controller, named)
    if tuple(labels.shape) != packed.shape:
        raise ValueError(f"labels must have the shape of the batch, {list(packed.shape)}; got {list(labels.shape)}")
    ignore_index = named.get("ignore_index", -100)
    targets = packed.take(shift(labels, ignore_index) if shifted is None else shifted).to(packed.positions.device)
    x, step = controller.run(packed, ids, embeddings)
    loss = causal_lm_loss(
        x,
        controller.family.final_norm(controller.family.decoder(module)),
        head,
        targets.contiguous(),
        step,
        num_items_in_batch=named.get("num_items_in_batch"),
        ignore_index=ignore_index,
        segment_rows=controller.config.segment_rows,
    )
    output = CausalLMOutputWithPast(loss=loss)
    return output.to_tuple() if named.get("return_dict") is False else output


def _patch(module: nn.Module, controller: Controller, run: Callable[..., Any]) -> None:
    own = module.__dict__.get("forward")
    base = type(module).forward if own is None else own

    @functools.wraps(getattr(base, "__func__", base))
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        before = self.__dict__.get("_lemo_forward")
        original = types.MethodType(type(self).forward, self) if before is None else before
        active = self.__dict__.get("_lemo")
        if active is None or not (self.training and torch.is_grad_enabled()):
            return original(*args, **kwargs)
        return run(active, self, original, args, kwargs)

    # Bound methods follow a copy.deepcopy of the model; closures over the module would not.
    module.__dict__["_lemo_forward"] = own
    module.__dict__["_lemo"] = controller
    module.__dict__["forward"] = types.MethodType(forward, module)
    controller.__dict__.setdefault("_ours", []).append(module.__dict__["forward"].__func__)


def _unpatch(module: nn.Module) -> None:
    controller = module.__dict__.pop("_lemo")
    current = module.__dict__.get("forward")
    if getattr(current, "__func__", None) in controller.__dict__["_ours"]:
        before = module.__dict__.pop("_lemo_forward")
        del module.__dict__["forward"]
        if before is not None:
            module.__dict__["forward"] = before
    # Otherwise someone wrapped it since (Accelerate does); without a controller what they wrapped steps aside.


def _check_version() -> None:
    version = importlib.metadata.version("transformers")
    if not _TRANSFORMERS[0] <= int(version.split(".")[0]) < _TRANSFORMERS[1]:
        raise UnsupportedModelError(
            f"lemo supports transformers from {_TRANSFORMERS[0]}.0 and below {_TRANSFORMERS[1]}.0; installed is "
            f"{version}"
        )


def apply(model: nn.Module, config: LemoConfig | None = None) -> Controller:
    """Lets `model` train with token elimination, in place; `remove` undoes it.

    model: a transformers LlamaForCausalLM or OPTForCausalLM, before or after PEFT wraps it.
    Raises UnsupportedModelError (a ValueError) for other models and versions of transformers, ValueError where lemo is
    applied already or the settings do not fit, CalibrationError for a calibration of another model. Nothing is changed
    then.
    """
    config = LemoConfig() if config is None else config
    if not isinstance(config, LemoConfig):
        raise ValueError(f"config must be a lemo.LemoConfig; got {type(config).__name__}")
    _check_version()
    family, inner = find(model)
    check_modules(family, inner)
    shape: Any = inner.config
    layers = family.layers(family.decoder(inner))[: shape.num_hidden_layers]
    trained_parameters(family, layers)
    check_randomness(family, inner, loose_modules(family, layers), config.phases or ())
    if "_lemo" in inner.__dict__:
        raise ValueError("lemo is already applied to this model; call lemo.remove(model) first")
    decoder = family.decoder(inner)
    devices = {p.device for p in decoder.parameters()}
    if len(devices) > 1:
        names = ", ".join(sorted(str(d) for d in devices))
        raise UnsupportedModelError(f"lemo needs the whole model on one device; its weights are on {names}")
    count = len(family.layers(decoder))
    outside = [i for i in config.layers or () if not 0 <= i < count]
    if outside:
        raise ValueError(f"LemoConfig.layers: the model has layers 0 to {count - 1}; got {outside}")
    predictors = None
    if config.calibration is not None:
        from .predictors import PredictorSet

        predictors = PredictorSet.load(config.calibration, model=inner)
        if predictors.block_size != config.block_size:
            raise ValueError(
                f"LemoConfig.block_size is {config.block_size}, but {config.calibration} was calibrated for blocks of "
                f"{predictors.block_size} tokens: use that size or calibrate again"
            )
    controller = Controller(family, inner, config, predictors)
    _patch(decoder, controller, _decoder_forward)
    _patch(inner, controller, _causal_lm_forward)
    return controller


def remove(model: Any) -> None:
    """Gives `model` its own forward methods back. Raises ValueError if lemo is not applied to it."""
    inner: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
    controller = inner.__dict__.get("_lemo")
    if controller is None:
        raise ValueError("lemo is not applied to this model; nothing to remove")
    controller.warn_of_unreached()
    _unpatch(controller.family.decoder(inner))
    _unpatch(inner)
