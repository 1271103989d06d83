"""What the subcommands share: arguments, loading models and data, explaining errors."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from pathlib import Path
from typing import Any

# The commands print their own lines and bars; set before transformers is imported.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
# Torch's profiler says on stderr when it begins and ends; read when torch is imported.
os.environ.setdefault("KINETO_LOG_LEVEL", "6")

DTYPES = ("auto", "float32", "bfloat16", "float16")


class Formatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Keeps the examples' line breaks and shows defaults, unless there is none to show."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, False, argparse.SUPPRESS, []) or "default" in (action.help or ""):
            return action.help
        return super()._get_help_string(action)


def process() -> tuple[int, int]:
    """(rank, number of processes), from the environment variables of torchrun and accelerate launch."""
    from lemo.training.processes import world_size

    count = world_size()
    rank = os.environ.get("RANK", "")
    if count > 1 and not rank.isdecimal():
        raise ValueError(f"WORLD_SIZE is {count}, but RANK is {rank!r}; start several processes with torchrun")
    return (int(rank) if count > 1 else 0), count


def say(line: str) -> None:
    """A line for the user, on stderr: stdout carries results only. Of several processes, the first alone speaks."""
    if process()[0] == 0:
        print(line, file=sys.stderr, flush=True)


def explain(error: BaseException) -> tuple[str, int]:
    """(message, exit code) of an error; no message if another process has the error to report."""
    import torch

    from lemo.training.processes import AnotherProcessFailed

    if isinstance(error, AnotherProcessFailed):
        return "", 1

    if isinstance(error, torch.OutOfMemoryError):
        return (
            "out of GPU memory. What fits: lemo estimate --model ... --gpu ...; then a lower --keep, --recompute full, "
            "--schedule low-memory, --offload all or a smaller --context",
            2,
        )
    text = str(error).strip() or type(error).__name__
    if isinstance(error, FileNotFoundError) and error.filename:
        return f"{error.filename}: no such file or folder", 2
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror}", 2
    from lemo.predictors import CalibrationError
    from lemo.training.checkpoint import CheckpointError

    expected = (ValueError, OSError, ImportError, NotImplementedError, CheckpointError, CalibrationError)
    if isinstance(error, expected):
        return text, 2
    if isinstance(error, FloatingPointError):
        return text, 1
    if process()[1] > 1 and "closed by peer" in text:  # gloo raises nothing more specific
        return "another process of the run has ended; see its message", 1
    return f"{type(error).__name__}: {text} (run again with --debug for the traceback)", 1


def path_name(text: str) -> str:
    """The type of options that name a file or a folder: `~` is the home folder, and an empty name is refused.

    Shells leave `~` alone in --out=~/run, and a variable that is not set would be the current folder.
    """
    if not text.strip():
        raise argparse.ArgumentTypeError("expected the name of a file or folder, got an empty one")
    return os.path.expanduser(text)


def size(text: str) -> int:
    """The type of options that are a number of bytes."""
    from lemo.engine.sizes import parse_bytes

    try:
        return parse_bytes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def offload(text: str) -> bool | int | str:
    """The type of --offload: all, auto, none, a number of layers, or a size with its unit."""
    known: dict[str, bool | str] = {"all": True, "none": False, "auto": "auto"}
    if text in known:
        return known[text]
    if text.isdecimal() and int(text):
        return int(text)
    try:
        if not text.isdecimal() and size(text):
            return text
    except argparse.ArgumentTypeError:
        pass
    raise argparse.ArgumentTypeError(
        f"expected all, auto, none, a number of layers or a size of host memory, like 64GiB; got {text!r}"
    )


def recompute_layers(text: str) -> bool | int | str:
    """The type of --recompute-layers: auto, least, none, or the number of layers of a segment."""
    known: dict[str, bool | str] = {"least": True, "none": False, "auto": "auto"}
    if text in known:
        return known[text]
    if not text.isdecimal() or int(text) < 2:
        raise argparse.ArgumentTypeError(
            f"expected auto, least (memory), none or the number of layers of a segment, at least 2; got {text!r}"
        )
    return int(text)


# ---- arguments -------------------------------------------------------------------------------------------------------


def add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")


INTERPOLATE = (
    "stretch rotary positions linearly if --context exceeds the model's own; give the same whenever the adapter is used"
)


def add_model(parser: argparse.ArgumentParser, required: bool = True, of_runs: bool = False) -> None:
    """of_runs: options that are not given are those of the adapters' runs (`lemo.cli.recorded`)."""
    runs = "as the adapters' runs were trained"
    default = f" (default: {runs})" if of_runs else ""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model", type=path_name, required=required, help="folder of a transformers causal LM, or its name on the hub"
    )
    group.add_argument(
        "--tokenizer",
        type=path_name,
        help="folder or name of the tokenizer, if it is not the model's own" + default,
    )
    group.add_argument("--device", help="cpu, cuda or cuda:N (default: a GPU if there is one)")
    on_gpu = f"on a GPU {runs}, without a run bfloat16" if of_runs else "bfloat16 on a GPU"
    group.add_argument("--dtype", choices=DTYPES, help=f"of the frozen weights (default: {on_gpu}, else float32)")
    group.add_argument(
        "--interpolate-positions",
        action="store_true",
        default=None,
        help=INTERPOLATE + default,
    )


def add_data(parser: argparse.ArgumentParser, required: bool = True) -> None:
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data",
        nargs="+",
        action="extend",
        required=required,
        metavar="[NAME=]SOURCE",
        help="text files, folders, globs, *.jsonl, *.json, *.csv, *.parquet (compressed ones too), *.bin or *.npy "
        "(tokens), a data set saved on disk, or hf:NAME[:SPLIT]",
    )
    group.add_argument(
        "--text-field",
        help="field of records that holds the text, tokens or messages (default: input_ids, text, messages, or prompt "
        "and completion, whichever is there)",
    )
    group.add_argument(
        "--answers-only",
        action="store_true",
        default=None,
        help="learn only the answers of conversations and the completions of prompts (default: every token)",
    )
    group.add_argument(
        "--token-dtype",
        choices=("uint16", "uint32"),
        help="width of token files without a header (default: uint16 if the vocabulary fits, else it must be given)",
    )
    group.add_argument(
        "--special-tokens-in-text",
        choices=("auto", "parse", "plain"),
        help="read special tokens written out in a text as tokens (parse) or as ordinary text (plain); auto parses "
        "texts that begin with one, as chat templates write them (default: auto)",
    )
    group.add_argument(
        "--joined",
        action="store_true",
        default=None,
        help="join each source into one stream in which documents see one another (default: documents stay apart)",
    )


# Options next to --data that decide what is read: a run keeps them for --resume.
DATA_OPTIONS = ("text_field", "joined", "answers_only", "token_dtype", "special_tokens_in_text")


def absolute(source: str) -> str:
    """A path or `NAME=path` made absolute, so that a run can resume from another folder; names on the hub stay."""
    name, equals, where = source.partition("=")
    label, path = (f"{name}=", where) if equals and "/" not in name and not Path(source).exists() else ("", source)
    if not path or path.startswith("hf:") or not (Path(path).expanduser().exists() or any(c in path for c in "*?[")):
        return source
    return label + os.path.abspath(os.path.expanduser(path))


# ---- loading ---------------------------------------------------------------------------------------------------------


def device_of(name: str | None) -> Any:
    import torch

    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device {name}: expected cpu, cuda or cuda:N") from None
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if process()[1] > 1:
            if ":" in name:
                raise ValueError(f"--device {name}: several processes take one GPU each; give --device cuda")
            local = int(os.environ.get("LOCAL_RANK", "0"))
            if local >= count:
                raise ValueError(
                    f"process {local} of this machine has no GPU: torch sees {count}; start at most as many processes "
                    "as there are GPUs"
                )
            return torch.device("cuda", local)
        if not count or (device.index or 0) >= count:
            raise ValueError(f"--device {name}: this machine shows {count} usable GPUs to torch; use --device cpu")
    return device


def load_tokenizer(where: str, required: bool = False) -> Any:
    """The tokenizer, or None if the folder has none and it is not required."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(where, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        if not required:
            return None
        raise ValueError(f"--tokenizer {where}: cannot be loaded ({_first_line(error)})") from error
    return tokenizer


def load_config(where: str, context: int | None, interpolate: bool) -> Any:
    """The configuration of the causal language model to load, its positions stretched to `context` on request."""
    from transformers import AutoConfig

    from lemo.engine import families

    path = Path(where).expanduser()
    if not path.exists() and (where.startswith((".", "/", "~")) or where.count("/") > 1):
        raise ValueError(f"--model {where}: no such folder")
    try:
        config = families.language_config(AutoConfig.from_pretrained(where, trust_remote_code=False))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--model {where}: no transformers model can be read from it ({_first_line(error)})"
        ) from error
    longest = getattr(config, "max_position_embeddings", None)
    if context is None or longest is None or context <= longest:
        return config
    rope: Any = getattr(config, "rope_parameters", None)
    if not interpolate:
        hint = "; --interpolate-positions stretches them" if rope else " (its position embeddings are learned)"
        raise ValueError(f"--context {context} exceeds the model's {longest} positions{hint}")
    # With separate positions by kind of layer, those with a window see no distance that they do not know.
    by_kind = bool(rope) and "full_attention" in rope
    far = rope["full_attention"] if by_kind else rope
    if not far or far.get("rope_type", "default") != "default":
        kind = far.get("rope_type") if far else "learned position embeddings"
        raise ValueError(f"--interpolate-positions needs plain rotary positions; this model has {kind}")
    far = {**far, "rope_type": "linear", "factor": context / longest}
    config.rope_parameters = {**rope, "full_attention": far} if by_kind else far
    config.max_position_embeddings = context
    return config


AS_THE_MODEL = "or all positions of a model that has fewer"  # in the help of a context, after its default


def default_context(args: argparse.Namespace, usual: int, option: str = "--context") -> int:
    """The context of a command that was given none: `usual`, or what the model has if that is less, which is said. With
    --interpolate-positions `usual`: positions are to be stretched."""
    if args.interpolate_positions:
        return usual
    longest = getattr(load_config(args.model, None, False), "max_position_embeddings", None)
    if longest is None or longest >= usual:
        return usual
    say(f"{option} {longest}: the model has no more positions")
    return int(longest)


def stretches(where: str, context: int) -> bool:
    """Whether a context takes more positions than the model has."""
    longest = getattr(load_config(where, None, False), "max_position_embeddings", None)
    return longest is not None and context > longest


def check_supported(config: Any, device: Any = None, scored: int | None = None) -> None:
    """Raises UnsupportedModelError for a model that lemo cannot train, at all or on `device`. scored: tokens of the
    documents whose blocks are to be scored exactly there.

    Looks at an empty copy: no weights are read.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from lemo.engine import families

    try:
        with torch.device("meta"):
            attention = families.loading(config)["attn_implementation"]
            model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, trust_remote_code=False)
    except (ValueError, ImportError) as error:
        raise families.UnsupportedModelError(
            f"lemo does not support models of type {config.model_type!r} ({_first_line(error)})"
        ) from error
    family, _ = families.find(model)
    device = torch.device("cpu") if device is None else device
    family.check_kernels(config, device)
    if scored is not None:
        family.check_score_kernels(config, scored, device)


def load_model(
    args: argparse.Namespace, context: int | None = None, *, to_train: bool = False, scored: int | None = None
) -> Any:
    """The frozen base model of --model on --device, in --dtype. to_train, scored: only one that `check_supported` lets
    pass."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    from lemo.engine import families

    logging.getLogger("transformers").setLevel(logging.ERROR)
    if args.quiet:
        transformers_logging.disable_progress_bar()
    if to_train:  # first: an unsupported model matters more than a context that is too long for it
        check_supported(load_config(args.model, None, False), device_of(args.device), scored)
    config = load_config(args.model, context, bool(args.interpolate_positions))
    device = device_of(args.device)
    name = args.dtype or "auto"
    dtype = {"auto": torch.float32 if device.type == "cpu" else torch.bfloat16}.get(name) or getattr(torch, name)
    if device.type == "cpu" and dtype is not torch.float32:
        raise ValueError(f"--dtype {name}: the CPU backend computes in float32; leave --dtype out or use a GPU")
    try:
        model, loaded = AutoModelForCausalLM.from_pretrained(
            args.model,
            config=config,
            dtype=dtype,
            trust_remote_code=False,
            output_loading_info=True,
            **families.loading(config),
        )
    except Exception as error:  # transformers, safetensors and json raise their own kinds for a damaged folder
        reason = _first_line(error)
        if "ignore_mismatched_sizes" in reason:
            reason = "their shapes differ from those in its config.json"
        raise ValueError(f"--model {args.model}: its weights cannot be loaded ({reason})") from error
    # transformers draws what a folder lacks at random, and only warns.
    if loaded["missing_keys"]:
        first = sorted(loaded["missing_keys"])[0]
        raise ValueError(f"--model {args.model}: not a complete causal language model: its weights lack {first}")
    return model.to(device).requires_grad_(False)


def load_data(args: argparse.Namespace, config: Any, **options: Any) -> Any:
    """`lemo.data.Documents` of --data, for the model of this configuration."""
    from lemo.data import load_documents

    tokenizer = load_tokenizer(args.tokenizer or args.model, required=args.tokenizer is not None)
    return load_documents(
        args.data,
        tokenizer,
        text_field=args.text_field,
        vocab_size=config.vocab_size,
        token_dtype=args.token_dtype,
        end_of_text=None if tokenizer is not None else _end_of_text(config),
        special_tokens=args.special_tokens_in_text or "auto",
        answers_only=bool(args.answers_only),
        joined=bool(args.joined),
        progress=not args.quiet,
        report=say,
        **options,
    )


def _end_of_text(config: Any) -> int | None:
    """What ends documents according to the model, for token files if there is no tokenizer to ask."""
    end: Any = getattr(config, "eos_token_id", None)
    return (end[0] if end else None) if isinstance(end, list) else end


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
