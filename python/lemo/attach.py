"""`lemo.apply` and `lemo.remove`: one model instance trains through the engine, and is as it was afterwards.

Two `forward` methods are covered on the instance (see `lemo.patching`): the decoder's and the causal language model's.
Both step aside unless the module trains and gradients are on, so evaluation and `generate` run transformers' own code.
"""

from __future__ import annotations

import copy
import importlib.metadata
import inspect
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from . import ops, trl_head
from .checks import check_modules, check_randomness, loose_modules, trained_parameters
from .checks_peft import check_adapters, check_device, check_weights
from .config import LemoConfig, Phase
from .engine import Stack, Step
from .families import UnsupportedModelError, find
from .families.base import Family
from .layout import Kept
from .lora import projection
from .loss import Targets, causal_lm_logits, causal_lm_loss, causal_lm_output
from .packing import Packed, pack
from .participation import Participation, may_keep_output, outputs_of, trains_before_layers
from .patching import attach, base_model, controller_of, detach
from .policies import Policy, StepContext, make_policy, mix_seed
from .reference import Pass, Passes, adapters_disabled
from .replay import Draw, Draws, under_checkpoint
from .schedule import LemoCallback, Schedule
from .trainers import refuse_comparisons, running_trainer, skips_tokens

logger = logging.getLogger(__name__)

_EVAL_MODE = (
    "the model is in eval mode, as from_pretrained returns it (inside a PeftModel too, whose own flag says otherwise). "
    "Call model.train() to train, or use torch.no_grad() to evaluate"
)

_LOSS_OF_OTHERS = (
    'mode "skip" makes logits for a loss that lemo does not compute (label smoothing, a loss function of your own). '
    "Tokens that were in no layer predict from their embedding alone, so a loss over them is too large, and lemo "
    "cannot keep the blocks that carry labels. Let the model compute the loss from labels, or use phases with an exact "
    'forward pass (mode "backward" or "dense")'
)

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
        self._loss_tokens: Tensor | None = None
        self._last_phase: int | None = None
        self._policies = self._make_policies()
        self._draws = Draws()
        self._passes = Passes()
        self.referring = False
        self._seen_forward: Any = None
        self._notes: set[str] = set()

    def _make_policies(self) -> list[Policy | None]:
        return [
            None if p.mode == "dense" else make_policy(*self.config.policy(p), self.predictors)
            for p in self.schedule.phases
        ]

    def __deepcopy__(self, memo: dict[int, Any]) -> Controller:
        """The controller of a copy of the model: at the same step, with policies that remember no batch."""
        twin = memo[id(self)] = object.__new__(type(self))
        plain = {name: value for name, value in self.__dict__.items() if name != "_policies"}
        twin.__dict__.update(copy.deepcopy(plain, memo))
        twin._policies = twin._make_policies()
        return twin

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            "a lemo Controller cannot be pickled: save the model (it loads without lemo), keep the LemoConfig "
            "(`config.to_dict()`), and call lemo.apply and controller.seek(step) after loading"
        )

    # --- progress ---

    @property
    def applied(self) -> bool:
        """Whether lemo still is applied to this controller's model."""
        return controller_of(self.model) is self

    def step(self) -> None:
        """One optimizer step is done. Call it in a loop of your own after `optimizer.step()`."""
        self.end_step()
        self.seek(self.step_index + 1)

    def seek(self, step: int) -> None:
        """Continues at optimizer step `step` (from 0), as after a resume."""
        if step < 0:
            raise ValueError(f"step must not be negative; got {step}")
        self.step_index, self.micro_batch = int(step), 0
        self._passes.clear()

    def begin_training(self, model: Any, arguments: Any, trainer: Any) -> None:
        """A Trainer begins, with the model that it trains. Raises ValueError where lemo must not run."""
        if model is not None and base_model(model) is not self.model:
            raise ValueError(
                f"LemoCallback: the Trainer trains another {type(base_model(model)).__name__} than the one lemo was "
                "applied to: call lemo.apply(trainer.model) and give the Trainer the callback of that controller"
            )
        refuse_comparisons(self.schedule.phases, trainer, arguments)
        self.cover_heads()

    def end_step(self) -> None:
        """Says so, once, where a step went by without a forward pass of lemo's."""
        if self.micro_batch > 0:
            return
        if not self.applied:
            reason = "lemo was removed from the model, or applied to it again with another controller"
        elif not self.model.training:
            reason = _EVAL_MODE
        else:
            reason = "no forward pass with gradients reached this model: is it the one that is trained?"
        self._note(f"a step was made without lemo: {reason}")

    def stepped_aside(self, module: nn.Module, named: dict[str, Any]) -> None:
        """A forward pass goes to transformers. Says so, once, where it looks as if lemo should see it."""
        if torch.is_grad_enabled():
            if not module.training and named.get("labels") is not None:
                self._note(f"a loss is computed with gradients, but without lemo: {_EVAL_MODE}")
            return
        ids = named.get("input_ids")
        if (
            ids is not None
            and module.training
            and self._passes.has_shape(tuple(ids.shape))
            and adapters_disabled(self.model)
        ):
            self._note(
                "a pass without adapters sees every token, while the training passes of this step left some out: where "
                "the two are compared (a preference loss), run it inside `with controller.reference_pass():`"
            )

    @contextmanager
    def reference_pass(self) -> Iterator[None]:
        """Forward passes inside leave out what this step's training pass over the same batch did, layer by layer.

        For losses that compare the two. Gradients are off inside; the model may be in any mode, its adapters disabled.
        Raises RuntimeError, at the forward pass, where no training pass had the batch. In phases whose forward pass is
        exact there is nothing to repeat, and transformers runs.
        """
        before = self.referring
        self.referring = skips_tokens(self.phase)
        try:
            with torch.no_grad():
                yield
        finally:
            self.referring = before

    def cover_heads(self) -> None:
        """Comes out on top again where another library has put its own loss over ours since (see `lemo.trl_head`)."""
        present = self.model.__dict__.get("forward")
        if present is not self._seen_forward:
            trl_head.cover(self.model)
            self._seen_forward = self.model.__dict__.get("forward")

    def callback(self) -> LemoCallback:
        """The callback that moves this controller under the transformers Trainer."""
        return LemoCallback(self)

    @property
    def phase(self) -> Phase:
        """The phase of the coming step."""
        return self.schedule.phase(self.step_index, self.total_steps)

    def report(self) -> dict[str, Any]:
        """The last forward pass in plain values, for logs.

        loss_tokens: targets the loss was over (read from the device); None where lemo did not compute it.
        """
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
            "loss_tokens": None if self._loss_tokens is None else int(self._loss_tokens),
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

    def run(
        self, packed: Packed, ids: Tensor | None, embeddings: Tensor | None, labelled: Tensor | None = None
    ) -> tuple[Tensor, Step]:
        """The residual stream [T, d] after the last layer, before the final norm; from ids [B, S] or embeddings.

        labelled: bool [T], tokens that have a target; None where that is unknown.
        """
        family, decoder = self.family, self.family.decoder(self.model)
        layers = family.layers(decoder)[: self.model.config.num_hidden_layers]
        batch = ids if embeddings is None else embeddings
        assert batch is not None
        if self.micro_batch == 0:
            self._check_surroundings(layers, batch)
        check_modules(family, self.model)
        params, loose = trained_parameters(family, layers), loose_modules(family, layers)
        draw, again, earlier = self._which_pass(batch, packed)
        index = self.schedule.index(draw.step, self.total_steps)
        self._warn_of_empty_phases()
        random = check_randomness(family, self.model, loose, self.schedule.phases[index:])
        phase = self.schedule.phases[index]
        policy = self._policies[index] if earlier is None else None
        remembered = self._passes.begin(batch, packed.blocks) if skips_tokens(phase) and not again else None
        embedding = self.model.get_input_embeddings()
        with outputs_of(embedding) as embedded:
            # Hooks on the embedding (NEFTune) see the batch as it is.
            given = decoder.embed_tokens(ids) if embeddings is None else embeddings
            x = family.embed(decoder, None, packed.take(given), packed.positions)
        took_part = Participation(phase.mode != "skip" or trains_before_layers(x, embedded))
        embedded.clear()
        x = x.to(self._compute_dtype(x))
        tables = family.tables(decoder, x.detach(), packed.positions)
        everything = Kept.everything(packed.blocks)
        if policy is not None:
            policy.begin(self._step_context(packed, phase, layers, tables, draw, labelled))
        kept_ratios: tuple[list[float], list[float]] = ([], [])
        if not again:  # a recomputation may end half-way, and has nothing new to report
            self.micro_batch += 1
            (self.kept_ratios, self.mlp_kept_ratios), self._loss_tokens = kept_ratios, None
        self._tokens, self._blocks, self._last_phase = packed.blocks.num_tokens, packed.blocks.num_blocks, index

        def choose(i: int, rows: Tensor) -> tuple[Kept | None, Kept | None]:
            if earlier is not None:
                return earlier.kept(i, packed.blocks)
            kept = self._choose(policy, phase, everything, i, rows)
            for ratios, part in zip(kept_ratios, kept, strict=True):
                ratios.append(0.0 if part is None else part.num_blocks / packed.blocks.num_blocks)
                took_part.add(part)
            if remembered is not None:
                remembered.add(kept)
            return kept

        # Nothing is eliminated: the exact layers, with what `recompute` says. (Mode "backward" over everything too.)
        step = Step(
            family=family,
            layers=layers,
            blocks=packed.blocks,
            tables=tables,
            mode=phase.mode,
            recompute=self._recompute() if earlier is None else "full",
            weighted=phase.weighted,
            deterministic=self.config.deterministic,
            random=random,
            general=bool(loose),
            choose=choose,
            observe=policy.observe if policy is not None and policy.needs_update else None,
            borrowed=embeddings is not None or x.requires_grad or may_keep_output(embedding),
            autocast=self._autocast(x),
            part=took_part,
        )
        return Stack.apply(x, step, *params), step

    def _check_surroundings(self, layers: list[nn.Module], batch: Tensor) -> None:
        """What may have changed since `lemo.apply`: who trains, adapters, how weights are spread."""
        if "trl" in sys.modules:
            refuse_comparisons((self.phase,), running_trainer())
        check_adapters(self.model)
        check_device(batch, self.model.get_input_embeddings().weight.device)
        check_weights(layers)

    def _which_pass(self, batch: Tensor, packed: Packed) -> tuple[Draw, bool, Pass | None]:
        """The draw of a pass; whether an earlier pass had it; that pass, where its very lists are to be repeated."""
        draw = Draw(self.step_index, self.micro_batch)
        if self.referring:
            return draw, True, self._passes.find(batch, packed.blocks)
        return *self._draws.next(draw, not skips_tokens(self.phase)), None

    def _choose(
        self, policy: Policy | None, phase: Phase, everything: Kept, layer: int, rows: Tensor
    ) -> tuple[Kept | None, Kept | None]:
        if policy is None or (self.config.layers is not None and layer not in self.config.layers):
            return everything, everything
        shared, mlp = policy.choose(layer, rows)
        # One object for all that keep everything, so that its tensors exist once; but a weighted draw of everything
        # still has its weights.
        shared_all = shared is not None and shared.is_everything and not phase.weighted
        mlp_all = mlp is not None and mlp.is_everything and not phase.weighted
        return everything if shared_all else shared, everything if mlp_all else mlp

    def _required(self, packed: Packed, phase: Phase, labelled: Tensor | None) -> Tensor | None:
        """Blocks that mode "skip" has to keep for their labels, bool [nb], or None."""
        wanted = self.config.keep_labelled
        if phase.mode != "skip" or labelled is None or wanted is False:
            return None
        blocks = packed.blocks
        count = int(labelled.sum())
        if count == 0 or (wanted is None and 2 * count >= blocks.num_tokens):
            return None
        token = torch.arange(blocks.num_tokens, dtype=torch.int32, device=labelled.device)
        block = torch.bucketize(token, blocks.offsets[1:], right=True)
        return labelled.new_zeros(blocks.num_blocks).index_put_((block[labelled],), labelled.new_ones(()))

    def _step_context(
        self, packed: Packed, phase: Phase, layers: list[nn.Module], tables: Any, draw: Draw, labelled: Tensor | None
    ) -> StepContext:
        def queries_keys(i: int, x: Tensor) -> tuple[Tensor, Tensor]:
            n = self.family.norms(layers[i])[0]
            h, _ = ops.gather_norm(x, None, None, *n.contiguous, n.kind, n.eps)
            return self.family.queries_keys_values(layers[i], h, tables, None)[:2]

        return StepContext(
            blocks=packed.blocks,
            phase=phase,
            seed=mix_seed(self.config.seed, draw.step, draw.micro_batch),
            always_first=self.config.always_first,
            always_last=self.config.always_last,
            queries_keys=queries_keys,
            scale=lambda i: self.family.scale(layers[i]),
            required=self._required(packed, phase, labelled),
        )

    def _recompute(self) -> str:
        # A checkpoint around the model would recompute all of it for every local graph that a layer keeps.
        wanted = under_checkpoint() or any(getattr(m, "gradient_checkpointing", False) for m in self.model.modules())
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
    # Of the class: whoever wraps the instance's forward need not show its parameters.
    bound = inspect.signature(type(module).forward).bind_partial(module, *args, **kwargs)
    named = dict(bound.arguments)
    del named["self"]
    named.update(named.pop("kwargs", {}))
    return named


def _check_arguments(named: dict[str, Any]) -> None:
    for name in ("output_attentions", "output_hidden_states"):
        if named.get(name):
            raise ValueError(f"{name}=True is not available in training with lemo: call model.eval() or lemo.remove")
    if named.get("past_key_values") is not None:
        raise ValueError(
            "past_key_values is not available in training with lemo: call model.eval() to generate; adapters that "
            "train them (prefix tuning, cartridges) are not supported"
        )
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
    return packed, ids, embeddings


def _decoder_forward(
    controller: Controller, module: nn.Module, original: Callable[..., Any], args: Any, kwargs: Any
) -> Any:
    from transformers.modeling_outputs import BaseModelOutputWithPast

    controller.cover_heads()
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
    controller: Controller, module: Any, original: Callable[..., Any], args: Any, kwargs: Any
) -> Any:
    if controller.referring:  # the decoder below repeats the lists; the head may be anyone's
        return original(*args, **kwargs)
    named = _arguments(module, args, kwargs)
    _check_arguments(named)
    fused = trl_head.wanted(controller, module, original, kwargs)
    if fused is not None:
        packed, ids, embeddings = _packed(controller, named)
        return trl_head.fused_output(
            controller, module, fused, named, packed, lambda labelled: controller.run(packed, ids, embeddings, labelled)
        )
    if kwargs.get("fused_lm_head"):
        return original(*args, **kwargs)
    keep = named.get("logits_to_keep", 0)
    ordinary = isinstance(keep, int) and keep == 0 and getattr(module, "_loss_function", None) is None
    if named.get("labels") is None or not ordinary:
        # Only the layers run through lemo then.
        if skips_tokens(controller.phase):
            controller._note(_LOSS_OF_OTHERS)
        return original(*args, **kwargs)
    packed, ids, embeddings = _packed(controller, named)
    targets = Targets.of(packed, named)
    x, step = controller.run(packed, ids, embeddings, targets.values != targets.ignore_index)
    norm = controller.family.final_norm(controller.family.decoder(module))
    head = projection(module.lm_head, trainable=True)
    if head is None:
        controller._note(
            f"lm_head is a {type(module.lm_head).__name__} that the segmented loss does not cover: logits are whole"
        )
    if head is None or controller.config.return_logits:
        loss, count, logits = causal_lm_logits(x, norm, module.lm_head, targets, step, packed)
    else:
        loss, count = causal_lm_loss(x, norm, head, targets, step, segment_rows=controller.config.segment_rows)
        logits = None
    controller._loss_tokens = count
    return causal_lm_output(loss, logits, named.get("return_dict"))


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
    check_adapters(model)
    shape: Any = inner.config
    layers = family.layers(family.decoder(inner))[: shape.num_hidden_layers]
    check_weights(layers)
    check_modules(family, inner)
    trained_parameters(family, layers)
    check_randomness(family, inner, loose_modules(family, layers), config.phases or ())
    if controller_of(inner) is not None:
        raise ValueError("lemo is already applied to this model; call lemo.remove(model) first")
    decoder = family.decoder(inner)
    devices = {p.device for p in decoder.parameters()}
    if len(devices) > 1:
        names = ", ".join(sorted(str(d) for d in devices))
        raise UnsupportedModelError(
            f"lemo needs the whole model on one device; its weights are on {names}: load it without a device_map, or "
            'with device_map={"": 0}'
        )
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
    attach(decoder, controller, _decoder_forward)
    attach(inner, controller, _causal_lm_forward)
    controller.cover_heads()
    return controller


def remove(model: Any) -> None:
    """Gives `model` its own forward methods back. Raises ValueError if lemo is not applied to it."""
    inner = base_model(model)
    controller = controller_of(inner)
    if controller is None:
        raise ValueError("lemo is not applied to this model; nothing to remove")
    controller.warn_of_unreached()
    detach(controller.family.decoder(inner))
    detach(inner)
