"""lemo report: a run's table and pictures."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from lemo.cli.common import Formatter, add_common, path_name, say

_EPILOG = """\
examples:
  lemo report run               table on stdout, picture in run/report.png
  lemo report run --no-png      the table alone (needs no matplotlib)
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
    add_common(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from lemo.training.finetune import LOG_FILE, read_log, run_settings
    from lemo.training.plots import plot_run, summary

    folder = Path(args.run_folder)
    run_settings(folder)
    records = read_log(folder / LOG_FILE, say)
    print(summary(records))
    if not args.no_png:
        target = Path(args.png) if args.png else folder / "report.png"
        plot_run(records, target, title=folder.resolve().name)
        say(f"wrote {target}")
    return 0
