"""lemo report: a run's table, pictures and page."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from lemo.cli.common import Formatter, add_common, load_tokenizer, path_name, say
from lemo.storage import write_text

_EPILOG = """\
examples:
  lemo report run               table on stdout, picture in run/report.png
  lemo report run --no-png      the table alone (needs no matplotlib)
  lemo report run --html        table on stdout, one page with everything in run/report.html

The page is one file that loads nothing else: loss, learning rate, speed, cost, memory, settings, events, and maps of
what each layer kept of some windows, with the text of every block. The run recorded these (lemo finetune --maps), so
the page, like the run folder, holds parts of the training text; --no-text leaves the text out.
"""


def add(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "report",
        help="table and pictures of a run",
        description="A table of a run's phases, and a picture of its loss and of the kept ratio, layers by steps.",
        epilog=_EPILOG,
        formatter_class=Formatter,
    )
    parser.add_argument("run_folder", type=path_name, metavar="RUN", help="run folder of lemo finetune")
    parser.add_argument("--png", type=path_name, metavar="FILE", help="picture to write (default: RUN/report.png)")
    parser.add_argument("--no-png", action="store_true", help="no picture")
    parser.add_argument(
        "--html",
        nargs="?",
        const="",
        type=str,
        metavar="FILE",
        help="write a page (default: RUN/report.html); no picture",
    )
    parser.add_argument("--no-text", action="store_true", help="a page without the text of blocks")
    parser.add_argument("--tokenizer", type=path_name, help="folder or name of the tokenizer, if the run's was moved")
    add_common(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from lemo.training.finetune import LOG_FILE, read_log, run_settings
    from lemo.training.phases import unreached_of
    from lemo.training.plots import last_step, plot_run, summary

    folder = Path(args.run_folder)
    saved = run_settings(folder)
    records = read_log(folder / LOG_FILE, say)
    print(summary(records, unreached_of(saved, last_step(records))))
    if args.html is not None:
        target = Path(path_name(args.html)) if args.html else folder / "report.html"
        write_text(target, _page(args, folder))
        say(f"wrote {target}")
    elif not args.no_png:
        target = Path(args.png) if args.png else folder / "report.png"
        plot_run(records, target, title=folder.resolve().name)
        say(f"wrote {target}")
    return 0


def _page(args: argparse.Namespace, folder: Path) -> str:
    from lemo.training.finetune import run_settings
    from lemo.training.run_page import run_page

    saved = run_settings(folder)
    decode, no_text = _decoder(args, saved)
    return run_page(folder, decode, no_text, _recall(saved))


def _decoder(args: argparse.Namespace, saved: dict[str, Any]) -> tuple[Any, str]:
    """Tokens to text, and why there is no text."""
    if args.no_text:
        return (lambda tokens: "(left out: --no-text)"), "The text of blocks was left out (--no-text)."
    inputs = saved.get("inputs", {})
    where = args.tokenizer or inputs.get("tokenizer") or inputs.get("model")
    tokenizer = None if where is None else load_tokenizer(where, required=args.tokenizer is not None)
    if tokenizer is None:
        reason = f"no tokenizer can be loaded from {where}" if where else "run.json names no model"
        return None, f"Blocks are shown as token numbers: {reason}. --tokenizer FOLDER names another place."
    return tokenizer.decode, ""


def _recall(saved: dict[str, Any]) -> dict[str, Any] | None:
    """What the run's calibration measured, if it is still there."""
    from lemo.predictors import CalibrationError, PredictorSet

    place = saved["settings"].get("calibration")
    if place is None or not Path(place).is_dir():
        return None
    try:
        return dict(PredictorSet.load(place).report)
    except CalibrationError as error:
        say(f"the calibration's recall is not on the page: {error}")
        return None
