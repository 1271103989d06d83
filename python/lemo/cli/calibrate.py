"""lemo calibrate: train the predictors that choose blocks, or key tiles."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lemo.cli.common import (
    AS_THE_MODEL,
    Formatter,
    add_common,
    add_data,
    add_model,
    default_context,
    load_data,
    load_model,
    path_name,
    say,
)

if TYPE_CHECKING:
    from lemo.predictors import CalibrationSettings

_CONTEXT = 4096
# Documents of a whole context that the frozen model reads.
_DOCUMENTS = 128

_EPILOG = """\
examples:
  lemo calibrate --model MODEL --data books/ --context 16384 --out calibration
      predictors for keeping half of the blocks of 64 tokens

  lemo calibrate --model MODEL --data hf:my/corpus:train --context 8192 --keep 0.3 --steps 400 --out calibration

  lemo calibrate --model MODEL --data books/ --context 16384 --target mass --out tiles
      predictors of attention mass, for the choice of key tiles in mode sparse

Text like the fine-tuning data is best; a few million tokens are plenty. The model stays frozen: two small
networks per layer learn to predict, from a layer's input, which blocks its attention will find informative. The folder
holds lemo_config.json and predictors.safetensors, and is only accepted for this model. `lemo info calibration` shows
recall (the share of truly informative blocks that the predictors keep) layer by layer.

--target decides what the predictors are for, and a folder serves only that:
  importance  how much all later queries look at a block of tokens: which blocks a layer keeps (modes skip, backward)
  mass        what share of its attention each tile of 128 queries gives to each tile of 128 earlier keys: which tiles
              a query tile attends to (mode sparse, tile policy predictors). The report is covered mass, the share of
              the attention that the chosen tiles hold, of held-out text. "exact" is what no choice can beat at that
              density, "recent" are the nearest tiles and "random" is chance. "probe 2" and "probe 4" look at two and
              four rows of each query tile and need no calibration: if they cover more, use the tile policy probe.
"""


def add(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "calibrate",
        help="train the predictors that choose which blocks stay",
        description="Train, on your text and the frozen model, the predictors that choose which blocks stay, or which "
        "key tiles are attended to.",
        epilog=_EPILOG,
        formatter_class=Formatter,
    )
    parser.add_argument("--out", type=path_name, required=True, metavar="FOLDER", help="folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace a calibration that is there already")
    add_model(parser)
    add_data(parser)
    group = parser.add_argument_group("calibration")
    group.add_argument(
        "--target",
        choices=("importance", "mass"),
        default="importance",
        help="what to predict: importance of blocks (modes skip and backward), or attention mass of key tiles (sparse)",
    )
    group.add_argument("--context", type=int, help=f"tokens per window (default: {_CONTEXT}, {AS_THE_MODEL})")
    group.add_argument(
        "--block-size", type=int, help="tokens per block (default: 64; --target mass has tiles of 128, as the kernels)"
    )
    group.add_argument("--keep", type=float, help="fraction of the blocks kept (default: 0.5; not for --target mass)")
    group.add_argument("--documents", type=int, default=_DOCUMENTS, help="windows of text that the model reads")
    group.add_argument(
        "--probes",
        type=int,
        help="rows of a query tile whose attention is learned from, for --target mass (default: 8; 128: exact)",
    )
    group.add_argument("--steps", type=int, default=300, help="training steps of the predictors")
    group.add_argument(
        "--rank", type=int, help="hidden units of the networks before pruning (default: 64; for --target mass 16)"
    )
    group.add_argument(
        "--normalize", action="store_true", help="divide a block's score by the number of blocks that can see it"
    )
    group.add_argument("--seed", type=int, default=1, help="of the order of the data and of the networks")
    add_common(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    import torch

    from lemo.data import evaluation_pieces, permutation
    from lemo.predictors import CalibrationError, calibrate, format_coverage, format_report
    from lemo.predictors.store import check_target

    usual = args.context is None
    if usual:
        args.context = _CONTEXT
    settings = _settings(args)
    if args.answers_only:
        raise ValueError("--answers-only has no meaning here: calibration reads whole documents and uses no labels")
    out = Path(args.out)
    if out.exists() and not out.is_dir():
        raise CalibrationError(f"{out} is a file, expected a folder; choose another --out")
    if out.exists() and any(out.iterdir()) and not args.overwrite:
        raise CalibrationError(f"{out} exists already: choose another --out or add --overwrite")
    check_target(out, args.overwrite)  # not after the training
    if usual:
        args.context = default_context(args, _CONTEXT)
        settings = _settings(args)
    scored = args.context if args.target == "importance" else None
    model = load_model(args, args.context, to_train=True, scored=scored)
    documents = load_data(args, model.config)
    say(f"{documents.num_tokens} tokens in {len(documents)} documents")
    documents = dataclasses.replace(documents, trained=None)  # what is informative does not depend on labels
    shortest = settings.shortest
    pieces = [p for _, p in evaluation_pieces(documents, args.context) if len(p) > shortest]
    if len(pieces) < 2:
        mass = args.target == "mass"
        raise ValueError(
            f"the data hold {len(pieces)} documents longer than "
            + (f"{shortest} tokens, of which key tiles" if mass else f"a block of {shortest} tokens,")
            + (" can be chosen, two are needed; " if mass else " two are needed; ")
            + f"give longer documents, {'' if mass else 'a smaller --block-size, '}or --joined"
        )
    order = permutation(args.seed, 0, len(pieces))
    # As many tokens of short documents as of long ones.
    count = min(len(pieces), args.documents * args.context // (sum(map(len, pieces)) // len(pieces)))
    predictors = calibrate(
        model,
        (torch.from_numpy(pieces[i].astype("int64")) for i in order),
        dataclasses.replace(settings, max_documents=max(2, count)),
        progress=not args.quiet,
    )
    predictors.save(out, overwrite=args.overwrite)
    print((format_coverage if args.target == "mass" else format_report)(predictors.report))
    say(f"wrote {out}")
    return 0


def _settings(args: argparse.Namespace) -> CalibrationSettings:
    """Checks the options before anything is loaded. Raises ValueError naming the option."""
    from lemo.predictors import CalibrationSettings

    if args.steps < 1:
        raise ValueError(f"--steps {args.steps}: expected at least 1")
    if args.documents < 2:
        raise ValueError(f"--documents {args.documents}: expected at least 2, one of which is held out")
    common = {"context": args.context, "steps": args.steps, "rank": args.rank, "seed": args.seed}
    if args.target == "mass":
        for option, value in (("--keep", args.keep), ("--normalize", args.normalize or None)):
            if value is not None:
                raise ValueError(f"{option} has no meaning with --target mass: leave it out")
        if args.block_size not in (None, 128):
            raise ValueError(
                f"--block-size {args.block_size}: --target mass is about tiles of 128 tokens; leave it out"
            )
        if args.probes is not None and not 1 <= args.probes <= 128:
            raise ValueError(f"--probes {args.probes}: expected 1 to 128 rows of a query tile")
        least = CalibrationSettings(target="mass").shortest
        if args.context <= least:
            raise ValueError(
                f"--context {args.context}: --target mass needs more than {least} tokens, or there are no tiles to "
                "choose from"
            )
        return CalibrationSettings(target="mass", probes=args.probes or 8, **common)
    if args.probes is not None:
        raise ValueError("--probes is for --target mass: leave it out, or add --target mass")
    block, keep = 64 if args.block_size is None else args.block_size, 0.5 if args.keep is None else args.keep
    if block < 1 or args.context < 2 * block:
        raise ValueError(
            f"--context {args.context}: expected at least two blocks of {block} tokens, one leaves no choice"
        )
    if not 0 < keep <= 1:
        raise ValueError(f"--keep {keep}: expected a fraction in (0, 1]")
    return CalibrationSettings(block_size=block, keep=keep, normalize=args.normalize, **common)
