"""lemo calibrate: train the predictors that choose blocks."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from lemo.cli.common import Formatter, add_common, add_data, add_model, load_data, load_model, path_name, say

# Documents of a whole context that the frozen model reads.
_DOCUMENTS = 128

_EPILOG = """\
examples:
  lemo calibrate --model MODEL --data books/ --context 16384 --out calibration
      predictors for keeping half of the blocks of 64 tokens

  lemo calibrate --model MODEL --data hf:my/corpus:train --context 8192 --keep 0.3 --steps 400 --out calibration

Text like the fine-tuning data is best; a few million tokens are plenty. The model stays frozen: two small
networks per layer learn to predict, from a layer's input, which blocks its attention will find informative. The folder
holds lemo_config.json and predictors.safetensors, and is only accepted for this model. `lemo info calibration` shows
recall (the share of truly informative blocks that the predictors keep) layer by layer.
"""


def add(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "calibrate",
        help="train the predictors that choose which blocks stay",
        description="Train, on your text and the frozen model, the predictors that choose which blocks stay.",
        epilog=_EPILOG,
        formatter_class=Formatter,
    )
    parser.add_argument("--out", type=path_name, required=True, metavar="FOLDER", help="folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace a calibration that is there already")
    add_model(parser)
    add_data(parser)
    group = parser.add_argument_group("calibration")
    group.add_argument("--context", type=int, default=4096, help="tokens per window")
    group.add_argument("--block-size", type=int, default=64, help="tokens per block")
    group.add_argument("--keep", type=float, default=0.5, help="fraction of the blocks kept")
    group.add_argument("--steps", type=int, default=300, help="training steps of the predictors")
    group.add_argument("--rank", type=int, default=64, help="hidden units of the networks before pruning")
    group.add_argument(
        "--normalize", action="store_true", help="divide a block's score by the number of blocks that can see it"
    )
    group.add_argument("--seed", type=int, default=1, help="of the order of the data and of the networks")
    add_common(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    import torch

    from lemo.data import evaluation_pieces, permutation
    from lemo.predictors import CalibrationError
    from lemo.predictors.store import check_target

    if args.block_size < 1 or args.context < 2 * args.block_size:
        raise ValueError(
            f"--context {args.context}: expected at least two blocks of {args.block_size} tokens, one leaves no choice"
        )
    if not 0 < args.keep <= 1:
        raise ValueError(f"--keep {args.keep}: expected a fraction in (0, 1]")
    if args.steps < 1:
        raise ValueError(f"--steps {args.steps}: expected at least 1")
    if args.answers_only:
        raise ValueError("--answers-only has no meaning here: calibration reads whole documents and uses no labels")
    out = Path(args.out)
    if out.exists() and not out.is_dir():
        raise CalibrationError(f"{out} is a file, expected a folder; choose another --out")
    if out.exists() and any(out.iterdir()) and not args.overwrite:
        raise CalibrationError(f"{out} exists already: choose another --out or add --overwrite")
    check_target(out, args.overwrite)  # not after the training
    model = load_model(args, args.context, to_train=True)
    documents = load_data(args, model.config)
    say(f"{documents.num_tokens} tokens in {len(documents)} documents")
    documents = dataclasses.replace(documents, trained=None)  # what is informative does not depend on labels
    pieces = [p for _, p in evaluation_pieces(documents, args.context) if len(p) > args.block_size]
    if len(pieces) < 2:
        raise ValueError(
            f"the data hold {len(pieces)} documents longer than a block of {args.block_size} tokens, two are needed; "
            "give longer documents, a smaller --block-size, or --joined"
        )
    order = permutation(args.seed, 0, len(pieces))
    # As many tokens of short documents as of long ones.
    count = min(len(pieces), _DOCUMENTS * args.context // (sum(map(len, pieces)) // len(pieces)))
    from lemo.predictors import calibrate, format_report

    predictors = calibrate(
        model,
        (torch.from_numpy(pieces[i].astype("int64")) for i in order),
        block_size=args.block_size,
        keep=args.keep,
        steps=args.steps,
        context=args.context,
        rank=args.rank,
        normalize=args.normalize,
        max_documents=max(2, count),
        seed=args.seed,
        progress=not args.quiet,
    )
    predictors.save(out, overwrite=args.overwrite)
    print(format_report(predictors.report))
    say(f"wrote {out}")
    return 0
