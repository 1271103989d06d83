"""The version, which cpp/include/lemo/types.h states: that of the compiled library. Where the library cannot be loaded
(`lemo info` says why), that of the installed package, and "unknown" in a source checkout."""

import importlib.metadata

try:
    from lemo import _C
except ImportError:
    try:
        __version__ = importlib.metadata.version("lemo")
    except importlib.metadata.PackageNotFoundError:
        __version__ = "unknown"
else:
    __version__ = _C.version()
