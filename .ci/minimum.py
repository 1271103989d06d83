"""Do the lowest versions of transformers and PEFT that pyproject.toml declares work together, and with lemo?

Makes a separate environment that has those two in their lowest versions and everything else from the environment
this runs in, and trains tiny models there. Needs a package index. The tests named here take two minutes.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("transformers", "peft")
TESTS = (
    "tests/engine/test_apply.py",
    "tests/engine/test_dense.py",
    "tests/engine/test_every_family.py",
    "tests/engine/test_families.py",
    "tests/integration/test_patching.py",
)


def lowest() -> list[str]:
    """What pip installs: name==version of each package's lower bound."""
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    found = {name: re.match(rf"{name}>=([\d.]+)", entry) for name in PACKAGES for entry in declared if name in entry}
    missing = [name for name in PACKAGES if found.get(name) is None]
    if missing:
        sys.exit(f"pyproject.toml declares no lowest version (>=) of {', '.join(missing)}")
    return [f"{name}=={match[1]}" for name, match in found.items() if match is not None]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--venv", type=Path, default=ROOT / "build" / "minimum")
    folder = parser.parse_args().venv.absolute()
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
    # Looked up after the environment's own packages: torch and the tools come from where this runs.
    (packages,) = folder.glob("lib/python*/site-packages")
    others = [path for path in sys.path if path.endswith("-packages")]  # it may share those of the system
    (packages / "others.pth").write_text("\n".join(others) + "\n")
    wanted = lowest()
    print("lowest versions:", *wanted, flush=True)
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *wanted]
    subprocess.run(pip, check=True)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run([python, "-m", "pytest", "-q", *TESTS], cwd=ROOT, env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())
