"""SmolLM2 out of a GGUF file: what is no such file is refused."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "smol.gguf does not exist"),
        (b"", "smol.gguf is not a GGUF file"),
        (b"PK" * 9, "smol.gguf is not a GGUF file"),
    ],
)
def test_what_is_no_gguf_file_is_refused(tmp_path: Path, content: bytes | None, expected: str) -> None:
    source = tmp_path / "smol.gguf"
    if content is not None:
        source.write_bytes(content)
    before = os.listdir(tmp_path)
    command = [sys.executable, "-m", "embedded", "smollm2", f"source={source}", f"output={tmp_path / 'out'}"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 2, result.stderr
    assert expected in result.stderr
    assert "Traceback" not in result.stderr
    assert os.listdir(tmp_path) == before
