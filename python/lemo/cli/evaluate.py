"""lemo evaluate: dense perplexity, or accuracy of long-range tasks, of a model and its adapters, with intervals."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lemo.cli.common import (
    AS_THE_MODEL,
    Formatter,
    add_common,
    add_data,
    add_model,
    default_context,
    device_of,
    load_config,
    load_data,
    load_model,
    load_tokenizer,
    path_name,
    say,
)
from lemo.cli.recorded import Recorded, Trained, agreed, agreed_positions, recorded, trained_model

# Tokens of a piece or a document, if no run says.
_CONTEXT = 4096

_EPILOG = """\
examples:
  lemo evaluate --data dev/ --context 8192 --adapter run/adapter
      the base model that the adapter was trained on, and the adapter, side by side

  lemo evaluate --model MODEL --data code=src.jsonl law=law.txt --context 8192 \\
                --adapter dense=runs/dense/adapter skip=runs/skip/adapter --reference dense --json table.json
      two domains, two adapters, changes measured against the one called dense

  lemo evaluate --model MODEL --data 'books/*.txt' --per-file --context 4096
      every file by itself

  lemo evaluate RUN --tasks passkey,copy --lengths 4K,8K
      a run of lemo finetune: does the model find what stands far back, before and after the run?

  lemo evaluate --model MODEL --tasks all --lengths 16K --distances 0.1,0.5,0.9 --count 40 --data books/
      all tasks, with text of your own around the evidence

The adapter is measured as it is served: on the dense model. Intervals of perplexity are Student's, over documents if a
domain has at least ten and over windows otherwise; changes are paired over the same text, so they are far narrower than
two separate intervals suggest.

tasks:
  passkey    a number that was stated once
  multikey   one of several numbers, by its name
  variables  the value at the end of a chain of assignments, with another chain around it
  copy       how a random segment of 24 tokens continues
Documents of each length are filler (of --data, or made up) in which the evidence stands at --distances from the
questions at the end. An answer is right if greedy decoding gives all of its tokens, which one pass over the document
shows; accuracies have Wilson's intervals.
"""


def add(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "evaluate",
        help="dense perplexity per domain, or accuracy of long-range tasks, with confidence intervals",
        description="Dense perplexity per domain, or accuracy of long-range tasks (--tasks), of a model and its "
        "adapters, with confidence intervals.",
        epilog=_EPILOG,
        formatter_class=Formatter,
    )
    parser.add_argument(
        "folder", nargs="?", type=path_name, metavar="RUN", help="a run folder: its model and its adapter are measured"
    )
    add_model(parser, required=False, of_runs=True)
    add_data(parser, required=False)
    parser.add_argument(
        "--context",
        type=int,
        help=f"tokens a piece of text has at most (default: as the run was trained; without a run {_CONTEXT}, "
        f"{AS_THE_MODEL})",
    )
    parser.add_argument(
        "--adapter", nargs="+", action="extend", default=[], metavar="[NAME=]FOLDER", help="PEFT adapters to measure"
    )
    parser.add_argument(
        "--reference", help="what changes are measured against (default: the base, or the first adapter)"
    )
    parser.add_argument("--no-base", action="store_true", help="leave the model without adapter out")
    parser.add_argument("--per-file", action="store_true", help="a row for every file instead of every source")
    parser.add_argument("--max-tokens", type=int, help="use at most this many tokens of every domain")
    parser.add_argument("--confidence", type=float, default=0.95, help="level of the intervals")
    parser.add_argument(
        "--json",
        type=path_name,
        metavar="FILE",
        help="write the rows there as JSON too ('-': on stdout, in place of the table)",
    )
    group = parser.add_argument_group("long-range tasks, in place of perplexity")
    group.add_argument("--tasks", metavar="TASK,...", help="passkey, multikey, variables, copy, or all")
    group.add_argument(
        "--lengths",
        metavar="TOKENS,...",
        help=f"lengths of documents, as in 4K,8K (default: the context of the run; without a run 4K, {AS_THE_MODEL})",
    )
    group.add_argument(
        "--distances",
        metavar="SHARE,...",
        help="from evidence to questions, of a document (default: 0.1,0.35,0.65,0.95)",
    )
    group.add_argument("--count", type=int, help="documents of each length (default: 20)")
    group.add_argument("--seed", type=int, help="of the documents (default: 0)")
    add_common(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    if args.folder is not None:
        _take_from_run(args)
    args.named = None  # what names the model, if not the command
    if args.model is None:
        if not args.adapter:
            raise ValueError(
                "name what to evaluate: --model MODEL, or the folder of a run, or an --adapter that names its model "
                "(see lemo evaluate --help)"
            )
        # That of the run folder, if one is given, wherever adapters next to it found theirs.
        args.model, args.named = trained_model(args.adapter if args.folder is None else args.adapter[:1])
        say(f"--model {args.model}: as {args.named} names it")
        try:
            load_config(args.model, None, False)
        except ValueError as error:
            raise ValueError(f"{error}. {args.named} names it: if the model lies elsewhere, give --model") from error
    if not 0 < args.confidence < 1:
        raise ValueError(f"--confidence {args.confidence}: expected a level between 0 and 1, for instance 0.95")
    if args.no_base and not args.adapter:
        raise ValueError("--no-base without --adapter leaves nothing to evaluate")
    _take_recorded(args)
    if args.tasks is not None:
        return _run_tasks(args)
    for name in ("lengths", "distances", "count", "seed"):
        if getattr(args, name) is not None:
            raise ValueError(f"--{name} is of long-range tasks: name them with --tasks, for instance --tasks all")
    return _run_perplexity(args)


def _take_from_run(args: argparse.Namespace) -> None:
    """The adapter of a run folder, before those of --adapter."""
    from lemo.training.run_folder import ADAPTER, run_settings

    run_settings(args.folder)  # first: a folder that is no run is named as such
    adapter = Path(args.folder) / ADAPTER
    if not adapter.is_dir():
        raise ValueError(
            f"{args.folder}: the run has no adapter yet; end it with lemo finetune --out {args.folder} --resume"
        )
    args.adapter = [str(adapter), *args.adapter]


def _take_recorded(args: argparse.Namespace) -> None:
    """What the adapters' runs record, or adapters that lie elsewhere, for options that are not given. Raises ValueError
    if they differ in it.

    Sets args.stretched, the context to which they stretched the model's positions, if any. What is measured is taken
    when it is known whether that is perplexity or tasks.
    """
    args.recorded = recorded(args.adapter, args.model)
    args.runs = [one for one in args.recorded if isinstance(one, Trained)]
    args.stretched = agreed_positions(args.recorded, bool(args.interpolate_positions))
    if args.stretched is not None:
        args.interpolate_positions = True
        stretched = [one for one in args.recorded if one.stretched is not None]
        _say_taken(stretched, f"positions stretched to {args.stretched} tokens")
        if silent := [adapter for adapter in args.adapter if not recorded([adapter], args.model)]:
            say(f"{', '.join(silent)}: without a record of positions, so measured on the same")
    on_cpu = device_of(args.device).type == "cpu"  # which computes in float32, whatever the run's GPU did
    for name in ("tokenizer",) if on_cpu else ("tokenizer", "dtype"):
        if getattr(args, name) is None and (value := agreed(args.runs, name, f"--{name}")) is not None:
            setattr(args, name, value)
            _say_taken(args.runs, f"--{name} {value}")
    others = sorted({name for run in args.runs for name in run.options if getattr(args, name) is None})
    if args.data is not None and others:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in others)
        say(f"the run's own data were read with {names}; --data is read without")


def _say_taken(runs: Sequence[Recorded], what: str) -> None:
    names = ", ".join(run.folder for run in runs)
    say(f"{what}: as {names} {'was' if len(runs) == 1 else 'were'} trained")


def _recorded_context(args: argparse.Namespace, option: str) -> int:
    """That of the adapters' runs; if none is known, 4096 or what the model has."""
    context = agreed(args.recorded, "context", option)
    if context is None:
        return default_context(args, _CONTEXT, option)
    _say_taken(args.recorded, f"{option} {context}")
    return int(context)


def _positions(args: argparse.Namespace, context: int, name: str) -> int:
    """The context for which the model is loaded: that of the run, if it stretched positions."""
    if args.stretched is not None and context > args.stretched:
        raise ValueError(
            f"{name}: training stretched positions to {args.stretched} tokens, and the adapter is for those; evaluate "
            "at most that many"
        )
    return args.stretched or context


def _load_model(args: argparse.Namespace, context: int) -> Any:
    """As `load_model`. Raises ValueError if what names the model was trained on other weights than lie there now; runs
    that were not trained on a model which the command names are said."""
    from lemo.predictors.fingerprint import differences, model_fingerprint
    from lemo.training.run_folder import RUN_FILE

    model = load_model(args, context)
    fingerprints = [(Path(run.folder), run.fingerprint) for run in args.runs if run.fingerprint is not None]
    now = model_fingerprint(model) if fingerprints else {}
    for folder, fingerprint in fingerprints:
        if not (found := differences(fingerprint, now, "trained on")):
            continue
        what = f"{folder} was trained on another model than --model {args.model} is ({'; '.join(found)})"
        if args.named == str(folder / RUN_FILE):
            raise ValueError(
                f"{what}, although {args.named} names it: the model was exchanged. Give --model with the place of the "
                "other one, or with this one to measure the adapter on it all the same"
            )
        say(f"WARNING: {what}: what is measured is its adapter on this one")
    return model


# ---- perplexity ------------------------------------------------------------------------------------------------------


def _run_perplexity(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    from lemo.data import evaluation_pieces
    from lemo.training.evaluate import compare, model_labels

    if args.data is None:
        raise ValueError("--data is needed to measure perplexity; --tasks measures long-range tasks without it")
    context = _recorded_context(args, "--context") if args.context is None else args.context
    if context < 2:
        raise ValueError(f"--context {context}: expected at least 2 tokens")
    if args.max_tokens is not None and args.max_tokens < 2:
        raise ValueError(f"--max-tokens {args.max_tokens}: expected at least 2 tokens")
    labels = model_labels(args.adapter, not args.no_base)
    reference = args.reference or labels[0]
    if reference not in labels:
        raise ValueError(f"--reference {reference}: not among {', '.join(labels)}")
    model = _load_model(args, _positions(args, context, f"--context {context}"))
    documents = load_data(args, model.config, per_file=args.per_file)
    domains = documents.by_name()
    tokens = sum(len(p) for d in domains.values() for _, p in evaluation_pieces(d, context, args.max_tokens))
    count = len(args.adapter) + (not args.no_base)
    with tqdm(
        total=tokens * count, desc="evaluating", unit=" tokens", unit_scale=True, file=sys.stderr, disable=args.quiet
    ) as bar:
        result = compare(
            model,
            args.adapter,
            domains,
            context,
            include_base=not args.no_base,
            max_tokens=args.max_tokens,
            level=args.confidence,
            tick=bar.update,
        )
    rows = {"context": context, "confidence": args.confidence, "model": args.model, "rows": result.rows(reference)}
    return _write(args, rows, result.table(reference))


def _write(args: argparse.Namespace, values: dict[str, Any], table: str) -> int:
    if args.json == "-":
        print(json.dumps(values, indent=1))
        return 0
    print(table)
    if args.json:
        Path(args.json).write_text(json.dumps(values, indent=1) + "\n")
        say(f"wrote {args.json}")
    return 0


# ---- long-range tasks ------------------------------------------------------------------------------------------------


def _tasks(text: str) -> list[str]:
    from lemo.data.questions import TASKS

    names = list(TASKS) if text == "all" else [name.strip() for name in text.split(",")]
    unknown = [name for name in names if name not in TASKS]
    if unknown or len(set(names)) < len(names):
        raise ValueError(f"--tasks {text}: expected different ones of {', '.join(TASKS)}, or all")
    return names


def _lengths(text: str) -> list[int]:
    """Tokens of "4K,8192,1M"."""
    factors = {"K": 1 << 10, "M": 1 << 20}
    found = []
    for part in text.upper().split(","):
        number = part.strip()
        factor = factors.get(number[-1:], 1)
        number = number[:-1] if factor > 1 else number
        if not number.isdecimal() or int(number) < 1:
            raise ValueError(f"--lengths {text}: expected numbers of tokens, for instance 4K,8K or 4096,8192")
        found.append(int(number) * factor)
    return list(dict.fromkeys(found))


def _distances(text: str) -> list[float]:
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(0 < d < 1 for d in found):
        raise ValueError(f"--distances {text}: expected shares of a document between 0 and 1, for instance 0.1,0.5,0.9")
    return list(dict.fromkeys(found))


def _question_source(args: argparse.Namespace, config: Any) -> Any:
    """What documents are made of: text of --data, or made up; token ids if the model has no tokenizer."""
    import numpy as np

    from lemo.data.questions import plain_text, raw_source, tokenizer_source

    tokenizer = load_tokenizer(args.tokenizer or args.model, required=args.tokenizer is not None)
    if tokenizer is None:
        if args.data is not None:
            raise ValueError(
                f"--data: {args.model} has no tokenizer to ask questions about it with; name one with --tokenizer, or "
                "leave --data out to ask in raw token ids"
            )
        say(f"{args.model} has no tokenizer: documents are raw token ids")
        return raw_source(config.vocab_size)
    if args.data is None:
        filler = np.array(tokenizer(plain_text(20_000), add_special_tokens=False)["input_ids"])
    else:
        documents = load_data(args, config)
        filler = np.concatenate([documents.document(i) for i in range(len(documents))]).astype(np.int64)
    return tokenizer_source(tokenizer, filler)


def _run_tasks(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    from lemo.data.questions import DISTANCES, document
    from lemo.training.evaluate import model_labels
    from lemo.training.longrange import compare_long_range

    for name in ("context", "reference", "max_tokens", "per_file"):
        if getattr(args, name):
            raise ValueError(
                f"--{name.replace('_', '-')} is of perplexity, and --tasks has no use for it: leave it out"
            )
    tasks, lengths = _tasks(args.tasks), _lengths(args.lengths or str(_recorded_context(args, "--lengths")))
    distances = list(DISTANCES) if args.distances is None else _distances(args.distances)
    count, seed = 20 if args.count is None else args.count, args.seed or 0
    if count < 1 or seed < 0:
        raise ValueError(f"--count {count}, --seed {seed}: expected at least one document, and a seed from 0")
    model_labels(args.adapter, not args.no_base)
    positions = _positions(args, max(lengths), f"--lengths {max(lengths)}")
    source = _question_source(args, load_config(args.model, positions, bool(args.interpolate_positions)))
    documents = [document(source, n, seed, i, tasks, distances) for n in lengths for i in range(count)]
    model = _load_model(args, positions)
    measured = len(args.adapter) + (not args.no_base)
    with tqdm(
        total=measured * count * sum(lengths), desc="asking", unit=" tokens", unit_scale=True, file=sys.stderr,
        disable=args.quiet,
    ) as bar:  # fmt: skip
        result = compare_long_range(
            model, args.adapter, documents, include_base=not args.no_base, level=args.confidence, tick=bar.update
        )
    values = {"model": args.model, "tasks": tasks, "lengths": lengths, "distances": distances, "count": count}
    values |= {"seed": seed, "confidence": args.confidence, "rows": result.rows()}
    return _write(args, values, result.table())
