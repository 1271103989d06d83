"""`python -m lemo`: where the files are that C and C++ programs need; with a command, the same as `lemo`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

_PACKAGE = Path(__file__).absolute().parent

# option: (where an installed package has it, what shows that it is there, help)
_FOLDERS = {
    "cmake-dir": ("lib/cmake/lemo", "lemo-config.cmake", "the CMake package is, for -Dlemo_DIR=..."),
    "pkgconfig-dir": ("lib/pkgconfig", "lemo.pc", "lemo.pc is, for PKG_CONFIG_PATH=..."),
    "include-dir": ("include", "lemo/lemo.h", "the headers are, for -I..."),
    "library-dir": ("lib", "liblemo.*", "the library is, for -L... and at run time LD_LIBRARY_PATH=..."),
}

_EPILOG = """\
The package carries liblemo for programs in C and C++:

  cmake -S . -B build -Dlemo_DIR="$(python -m lemo --cmake-dir)"     find_package(lemo CONFIG REQUIRED), lemo::lemo
  PKG_CONFIG_PATH="$(python -m lemo --pkgconfig-dir)" pkg-config --cflags --libs lemo

Commands (python -m lemo finetune ...) are those of the `lemo` tool: lemo --help
"""


def folder(option: str) -> Path:
    """One of cmake-dir, pkgconfig-dir, include-dir, library-dir. Raises FileNotFoundError if this package has none."""
    where, expected, _ = _FOLDERS[option]
    candidates = [_PACKAGE / where]
    if option == "library-dir":
        candidates.append(_PACKAGE)  # a source checkout whose build was copied next to the module
    for candidate in candidates:
        if any(candidate.glob(expected)):
            return candidate
    raise FileNotFoundError(
        f"--{option}: expected {expected} in {candidates[0]}, found none: this is a source checkout or an incomplete "
        "installation; install lemo with pip, or liblemo alone with cmake --install"
    )


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and not arguments[0].startswith("-"):
        from lemo.cli import main as command

        return command(arguments)
    parser = argparse.ArgumentParser(
        prog="python -m lemo",
        description="Print where the library's files for C and C++ are.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    group = parser.add_mutually_exclusive_group(required=True)
    group.add_argument("--version", action="store_const", const="version", dest="what", help="print lemo's version")
    for option, (_, _, text) in _FOLDERS.items():
        group.add_argument(f"--{option}", action="store_const", const=option, dest="what", help=f"print where {text}")
    what = parser.parse_args(arguments).what
    if what == "version":
        from lemo import __version__

        print(__version__)
        return 0
    try:
        print(folder(what))
    except FileNotFoundError as error:
        print(f"python -m lemo: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
