"""lemo evaluate: dense perplexity, with intervals, of a model and its adapters."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from lemo.cli.common import Formatter, add_common, add_data, add_model, load_data, load_model, path_name, say

_EPILOG = """\
examples:
  lemo evaluate --model MODEL --data dev/ --context 8192 --adapter run/adapter
      the base model and one adapter, side by side

  lemo evaluate --model MODEL --data code=src.jsonl law=law.txt --context 8192 \\
                --adapter dense=runs/dense/adapter skip=runs/skip/adapter --reference dense --json table.json
      two domains, two adapters, changes measured against the one called dense

  lemo evaluate --model MODEL --data 'books/*.txt' --per-file --context 4096
      every file by itself

The adapter is measured as it is served: on the dense model. Intervals are Student's, over documents if a domain has
at least ten and over windows otherwise; changes are paired over the same text, so they are far narrower than two
separate intervals suggest.
"""


def add(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "evaluate",
        help="dense perplexity per domain, with confidence intervals",
        description="Dense perplexity of a model and its adapters, per domain, with confidence intervals.",
        epilog=_EPILOG,
        formatter_class=Formatter,
    )
    add_model(parser)
    add_data(parser)
    parser.add_argument("--context", type=int, default=4096, help="tokens a piece of text has at most")
    parser.add_argument("--adapter", nargs="+", default=[], metavar="[NAME=]FOLDER", help="PEFT adapters to measure")
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
    add_common(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    from lemo.data import evaluation_pieces
    from lemo.training.evaluate import compare, model_labels

    if args.context < 2:
        raise ValueError(f"--context {args.context}: expected at least 2 tokens")
    if args.max_tokens is not None and args.max_tokens < 2:
        raise ValueError(f"--max-tokens {args.max_tokens}: expected at least 2 tokens")
    if not 0 < args.confidence < 1:
        raise ValueError(f"--confidence {args.confidence}: expected a level between 0 and 1, for instance 0.95")
    if args.no_base and not args.adapter:
        raise ValueError("--no-base without --adapter leaves nothing to evaluate")
    labels = model_labels(args.adapter, not args.no_base)
    reference = args.reference or labels[0]
    if reference not in labels:
        raise ValueError(f"--reference {reference}: not among {', '.join(labels)}")
    model = load_model(args, args.context)
    documents = load_data(args, model.config, per_file=args.per_file)
    domains = documents.by_name()
    tokens = sum(len(p) for d in domains.values() for _, p in evaluation_pieces(d, args.context, args.max_tokens))
    count = len(args.adapter) + (not args.no_base)
    with tqdm(
        total=tokens * count, desc="evaluating", unit=" tokens", unit_scale=True, file=sys.stderr, disable=args.quiet
    ) as bar:
        result = compare(
            model,
            args.adapter,
            domains,
            args.context,
            include_base=not args.no_base,
            max_tokens=args.max_tokens,
            level=args.confidence,
            tick=bar.update,
        )
    rows = {"context": args.context, "confidence": args.confidence, "model": args.model, "rows": result.rows(reference)}
    if args.json == "-":
        print(json.dumps(rows, indent=1))
        return 0
    print(result.table(reference))
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1) + "\n")
        say(f"wrote {args.json}")
    return 0
