"""From one typed function to an operator of torch: its schema, its fake kernel, its launch on CPU and CUDA.

A function decorated with `operator` has the operator's parameters, and its body allocates the outputs, whose shapes
follow from the arguments. That is all torch needs to know (the signature is the schema, the body the fake kernel), and
all the launch needs: parameters and outputs go to the fields of the C argument struct that have their names. Calling
the decorated function calls the operator.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from operator import itemgetter
from types import NoneType
from typing import Annotated, Any, ParamSpec, TypeVar, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from lemo import _native
from lemo.ops._autograd import differentiates, launcher, library, refuse_derivatives, unwatched, written

P = ParamSpec("P")
R = TypeVar("R")

# Types of parameters.
Size = Annotated[int, "SymInt"]  # a number that a compiled graph may leave open
Uint64 = Annotated[int, "uint64"]  # integers of a schema have a sign: the upper half travels as negative numbers
Norm = Annotated[str, "LEMO_NORM_"]  # an enumerator by the rest of its name, in lower case
Pool = Annotated[str, "LEMO_POOL_"]
SelectMode = Annotated[str, "LEMO_SELECT_"]
Reduction = Annotated[str, "LEMO_REDUCE_"]

# Kernels read strides as they are given, so a compiler must not choose others for them.
_TAGS = (getattr(torch.Tag, "needs_exact_strides", torch.Tag.needs_fixed_stride_order), torch.Tag.pt2_compliant_tag)

# Combinations of arguments' classes that an operator remembers.
_MOST_KNOWN = 256

Launch = Callable[[Mapping[str, Any]], None]


def operator(
    returns: str = "",
    *,
    calls: str | None = None,
    writes: str = "",
    renamed: Mapping[str, str] | None = None,
    constants: Mapping[str, Any] | None = None,
    shared: Mapping[str, str] | None = None,
    derivative: str | None = None,
    around: Callable[[Launch, dict[str, Any]], None] | None = None,
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Declares ``torch.ops.lemo.<function name without leading underscores>`` and returns the function that calls it.

    The decorated function allocates the outputs; None stands for one that is not wanted. An output is wanted unless a
    parameter ``want_<name>`` that its name begins with is False; callers get None then, torch an empty tensor.
    A parameter ``deterministic`` goes to the execution context.

    returns: names of the outputs, separated by blanks.
    calls: the operation of the C interface, by default the name without trailing underscores.
    writes: names of the parameters that are written in place.
    renamed: {parameter or output: field}, if the names differ; constants: {field: value} if there is no
    parameter; shared: {field: parameter} of outputs in a parameter's memory. Optional tensors that no parameter names
    are absent.
    derivative: "none": outputs never require a gradient; "error": they do if an input does, and asking for it raises
    RuntimeError; None: registered by the caller.
    around: called as around(launch, arguments) in place of launch(arguments), to adapt the arguments of the C struct.
    """

    options = {
        "calls": calls, "renamed": renamed or {}, "constants": constants or {}, "shared": shared or {}, "around": around
    }  # fmt: skip

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        declared = _Operator(function, returns, writes, options)
        declared.register(derivative)
        return declared.public()

    return decorate


class _Parameter:
    """A parameter of an operator, by its annotation."""

    def __init__(self, parameter: inspect.Parameter, hint: Any, letter: str | None) -> None:
        self.name, self.is_keyword = parameter.name, parameter.kind is inspect.Parameter.KEYWORD_ONLY
        self.has_default = parameter.default is not inspect.Parameter.empty
        self.default = parameter.default if self.has_default else None
        optional = NoneType in get_args(hint)
        bare = next(t for t in get_args(hint) if t is not NoneType) if optional else hint
        kind, meaning = get_args(bare) if get_origin(bare) is Annotated else (bare, "")
        names = {Tensor: "Tensor", int: "int", float: "float", bool: "bool", str: "str"}
        if kind not in names or (kind is str and not meaning):
            raise TypeError(f"{self.name}: expected a Tensor, int, float, bool, or an enumerator's type, got {hint}")
        self.is_tensor, self.is_unsigned = kind is Tensor, meaning == "uint64"
        self.type = "SymInt" if meaning == "SymInt" else names[kind]
        self.type += (f"({letter}!)" if letter else "") + ("?" if optional else "")
        # Classes that the dispatcher takes as they are.
        self.classes = {Tensor, torch.nn.Parameter} if self.is_tensor else {kind}
        self.classes |= {NoneType} if optional else set()
        self.convert: Callable[[Any], Any] | None = None
        if kind is str:
            self.convert = functools.cache(functools.partial(choice, self.name, prefix=meaning))
        elif self.is_unsigned:
            self.convert = (2**64).__rmod__
        elif optional and not self.is_tensor:
            self.convert = lambda given: 0 if given is None else given

    def schema(self) -> str:
        default = f'"{self.default}"' if isinstance(self.default, str) else repr(self.default)
        return f"{self.type} {self.name}" + (f"={default}" if self.has_default else "")


class _Operator:
    """One operator: everything that follows from the decorated function."""

    def __init__(self, function: Callable[..., Any], returns: str, writes: str, options: dict[str, Any]) -> None:
        self.function, self.returns, self.writes = function, returns.split(), writes.split()
        self.name = function.__name__.lstrip("_")
        self.calls = options["calls"] or self.name.rstrip("_")
        self.renamed, self.constants, self.around = options["renamed"], options["constants"], options["around"]
        self.shared: Mapping[str, str] = options["shared"]
        hints = get_type_hints(function, include_extras=True)
        letters = dict(zip(self.writes, "abcdefgh", strict=False))
        self.parameters = [
            _Parameter(p, hints[p.name], letters.get(p.name)) for p in inspect.signature(function).parameters.values()
        ]
        self.defaults = tuple(p.default for p in self.parameters)
        self.places = {p.name: i for i, p in enumerate(self.parameters)}
        self.flags = [name for name in self.places if name.startswith("want_")]
        self.written = [self.places[name] for name in self.writes]
        self.deterministic = self.places.get("deterministic")
        self.several = len(self.returns) > 1
        self.fixed = (*self.constants.values(), None)
        self.names = tuple(self.places)
        self.required = sum(not p.has_default for p in self.parameters)
        # Whether the dispatcher takes arguments of these classes as they are.
        self.known_classes: dict[tuple[type, ...], bool] = {}

    def register(self, derivative: str | None) -> None:
        library.define(self.schema(), tags=_TAGS)
        library.impl(self.name, self.run, "CPU")
        library.impl(self.name, self.run, "CUDA")
        torch.library.register_fake(f"lemo::{self.name}", self.fake, lib=library)
        if derivative == "none":
            library.impl(self.name, torch.library.fallthrough_kernel, "Autograd")
        elif derivative == "error":
            refuse_derivatives(self.name)

    def schema(self) -> str:
        single = len(self.returns) == 1
        result = "Tensor" if single else "(" + ", ".join(f"Tensor {name}" for name in self.returns) + ")"
        return f"{self.name}({', '.join(p.schema() for p in self.parameters)}) -> {result}"

    # --- kernels: arguments come by position, and the dispatcher leaves out defaults at the end -----------------------

    def fake(self, *args: Any) -> Any:
        return self.result(args, self.allocate(*args))

    def run(self, *args: Any) -> Any:
        if len(args) < len(self.defaults):
            args += self.defaults[len(args) :]
        outputs = self.allocate(*args)
        pick, conversions = self.sources
        values = pick((*args, *outputs, *self.fixed) if self.several else (*args, outputs, *self.fixed))
        if conversions:
            values = list(values)
            for i, convert in conversions:
                values[i] = convert(values[i])
        device, deterministic = args[0].device, self.deterministic is not None and args[self.deterministic]
        if self.around is None:
            _native.run(self.calls, device, values, deterministic)
        else:
            launch = functools.partial(_native.call, self.calls, device, deterministic=deterministic)
            self.around(launch, dict(zip(_native.fields(self.calls), values, strict=True)))
        for i in self.written:
            written(args[i])
        return self.result(args, outputs) if self.flags else outputs

    def result(self, args: tuple[Any, ...], outputs: Any) -> Any:
        if not self.flags:
            return outputs
        new = args[0].new_empty
        return tuple([new(0) if t is None else t for t in outputs])  # a list is quicker than a generator

    @functools.cached_property
    def allocate(self) -> Callable[..., Any]:
        """The decorated function for arguments that come by position."""
        names = [p.name for p in self.parameters if p.is_keyword]
        positional = len(self.parameters) - len(names)

        def allocate(*args: Any) -> Any:
            return self.function(*args[:positional], **dict(zip(names, args[positional:], strict=False)))

        return allocate if names else self.function

    @functools.cached_property
    def sources(self) -> tuple[Callable[[tuple[Any, ...]], Any], list[tuple[int, Callable[[Any], Any]]]]:
        """What picks the values of the C struct's fields out of (parameters, outputs, constants, None), and (position,
        conversion) of those to convert. Looked up on the first call: schemas need no compiled library."""
        roles = _native.fields(self.calls)
        inputs = [self.renamed.get(p.name, p.name) for p in self.parameters]
        outputs = [self.renamed.get(name, name) for name in self.returns or ["nothing"]]
        known = [*inputs, *outputs, *self.constants]
        used = {name for p, name in zip(self.parameters, inputs, strict=True) if p.is_tensor}
        used |= {*self.constants} | ({*outputs} if self.returns else set())
        absent = {field for field, role in roles.items() if role in ("optional", "optional_output", "companion")}
        used |= {*self.shared}
        wrong = (used - {*roles}) | ({*roles} - {*known} - {*self.shared} - absent)
        if wrong:
            raise TypeError(f"{self.name}: not matched by a field of lemo_{self.calls}_args, or by a value: {wrong}")
        places = {field: i for i, field in enumerate(roles)}
        conversions = [(places[name], p.convert) for p, name in zip(self.parameters, inputs, strict=True) if p.convert]
        sources = (self.shared.get(field, field) for field in roles)
        pick = itemgetter(*(known.index(name) if name in known else -1 for name in sources))
        return pick, conversions

    # --- past the dispatcher, whose way to a kernel in Python takes longer than most kernels -------------------------

    def by_position(self, args: tuple[Any, ...], keywords: Mapping[str, Any]) -> tuple[Any, ...] | None:
        """All arguments in the order of the parameters; None: the dispatcher has to say what is wrong with them."""
        n = len(args)
        needed, allowed = self.keywords_after(n)
        if not needed <= keywords.keys() <= allowed:
            return None
        get = keywords.get
        return (*args, *[get(name, default) for name, default in zip(self.names[n:], self.defaults[n:], strict=True)])

    @functools.cache  # noqa: B019 - operators live as long as the library
    def keywords_after(self, n: int) -> tuple[frozenset[str], frozenset[str]]:
        """Names of the parameters after the first n: of those without a default, and of all."""
        later = self.parameters[n:]
        return frozenset(p.name for p in later if not p.has_default), frozenset(p.name for p in later)

    def undispatched(self, args: tuple[Any, ...]) -> bool:
        """Whether calling the kernel itself is all that the dispatcher would do: tensors on the CPU or CUDA that
        autograd has nothing to do with, and numbers that need no conversion."""
        classes = tuple(map(type, args))
        known = self.known_classes.get(classes)
        if known is None:
            given = zip(classes, self.parameters, strict=False)
            known = self.required <= len(classes) <= len(self.parameters) and all(c in p.classes for c, p in given)
            if len(self.known_classes) < _MOST_KNOWN:
                self.known_classes[classes] = known
        return known and (args[0].is_cuda or args[0].is_cpu) and not differentiates(args)

    # --- the function to call -----------------------------------------------------------------------------------------

    def public(self) -> Callable[..., Any]:
        dispatched = launcher(getattr(torch.ops.lemo, self.name).default)
        run = self.run

        def launch(*args: Any, **keywords: Any) -> Any:
            if not unwatched():
                return dispatched(*args, **keywords)
            given = self.by_position(args, keywords) if keywords else args
            if given is None or not self.undispatched(given):
                return dispatched(*args, **keywords)
            return run(*given)

        unsigned = [p.name for p in self.parameters if p.is_unsigned]

        def launch_signed(*args: Any, **keywords: Any) -> Any:
            given = list(args)
            for name in unsigned:
                if self.places[name] < len(given):
                    given[self.places[name]] = _signed(name, given[self.places[name]])
                elif name in keywords:
                    keywords[name] = _signed(name, keywords[name])
            return launch(*given, **keywords)

        wanted = [next((flag for flag in self.flags if out.startswith(flag[5:])), "") for out in self.returns]
        given = [(self.places.get(flag, -1), flag, self.defaults[self.places.get(flag, -1)]) for flag in wanted]

        def launch_wanted(*args: Any, **keywords: Any) -> Any:
            outputs, n, get = launch(*args, **keywords), len(args), keywords.get
            pairs = zip(outputs, given, strict=True)
            return tuple(
                [t if i < 0 or (args[i] if i < n else get(f, default)) else None for t, (i, f, default) in pairs]
            )

        chosen = launch_wanted if self.flags else launch_signed if unsigned else launch
        return functools.wraps(self.function)(chosen)


def _signed(name: str, value: int) -> int:
    if not 0 <= value < 2**64:
        raise ValueError(f"{name}: expected an integer in [0, 2**64), got {value}")
    return value if value < 2**63 else value - 2**64


def need(name: str, tensor: Tensor, dimensions: str) -> None:
    """Raises ValueError unless the tensor has as many dimensions as ``dimensions`` ("T d") names: outputs are allocated
    from them before the library checks sizes, types and strides."""
    if tensor.dim() != len(dimensions.split()):
        wanted = ", ".join(dimensions.split())
        raise ValueError(f"{name}: expected shape [{wanted}], got {list(tensor.shape)}")


def choice(name: str, value: str, prefix: str) -> int:
    """The enumerator that begins with ``prefix`` and ends with ``value``. Raises ValueError for an unknown one."""
    known = _native.choices(prefix)
    if value not in known:
        raise ValueError(f"{name}: expected one of {', '.join(known)}, got {value!r}")
    return known[value]
