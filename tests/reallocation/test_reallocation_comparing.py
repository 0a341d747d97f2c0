"""`pipeline diff`: which tensors differ and by how much, over layouts, with the exit codes of diff."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest
from handmade_checkpoints import write_checkpoint, write_safetensors

from contracts.weights import read_header
from pipelines.main import main

NAME = "model.layers.1.mlp.up_proj.weight"


def diff(*arguments: Any, capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, Any]]:
    code = main(["diff", *map(str, arguments), "--json"])
    return code, json.loads(capsys.readouterr().out)


def change(model: Path, values: dict[int, bytes]) -> None:
    """Replace some bfloat16 numbers of a tensor."""
    file = model / "model.safetensors"
    content = bytearray(file.read_bytes())
    start = read_header(file)[NAME].start
    for index, value in values.items():
        content[start + 2 * index : start + 2 * index + 2] = value
    file.write_bytes(content)


def bfloat16(value: float) -> bytes:
    return struct.pack("<f", value)[2:]


def test_numbers_that_differ_are_counted_and_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = (write_checkpoint(tmp_path / name) for name in ("first", "second"))
    change(first, {0: bfloat16(1.0), 5: bfloat16(-2.0), 7: bfloat16(0.0), 9: bfloat16(1.0)})
    change(second, {0: bfloat16(1.5), 5: bfloat16(1.0), 7: bfloat16(-0.0), 9: bfloat16(float("nan"))})
    code, found = diff(first, second, capsys=capsys)
    assert code == 1
    assert found["tensors"] == 32
    assert found["differences"] == [
        {
            "name": NAME, "kind": "values", "first": "BF16 [24, 16]", "second": "BF16 [24, 16]", "elements": 384,
            "differ": 4, "largest": 3.0, "mean": 3.5 / 384, "not_finite": 1,
        }
    ]  # fmt: skip
    assert main(["diff", str(first), str(second), "--plain"]) == 1
    text = capsys.readouterr().out
    assert NAME in text
    assert "1 of 32 tensors differ" in text


def test_layouts_do_not_matter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = (write_checkpoint(tmp_path / name, remainders=True) for name in ("first", "second"))
    for model, layout in ((first, "tp=2,pp=3"), (second, "dp=3,shard=flat")):
        assert main(["reshard", str(model), "--to", layout, "--output", f"{model}-divided"]) == 0
    capsys.readouterr()
    assert diff(first, f"{first}-divided", capsys=capsys) == (
        0,
        {"first": str(first), "second": f"{first}-divided", "tensors": 64, "differences": []},
    )
    assert diff(f"{first}-divided", f"{second}-divided", capsys=capsys)[0] == 0
    change(second, {100: bfloat16(1.0)})
    code, found = diff(f"{first}-divided", second, capsys=capsys)
    assert (code, [each["name"] for each in found["differences"]]) == (1, [NAME])


def test_tensors_that_one_lacks_and_other_shapes_and_formats(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shapes = {"a": (2, 3), "b": (4,), "c": (2,), "d": (2,)}
    for name, known, dtype in (
        ("first", shapes, "F32"),
        ("second", {"a": (3, 2), "b": (4,), "c": (2,), "e": (1,)}, "F32"),
        ("third", shapes, "BF16"),
    ):
        write_safetensors(tmp_path / name / "model.safetensors", known, dtype=dtype)
        (tmp_path / name / "config.json").write_text("{}")
    write_safetensors(tmp_path / "second/value_head/model.safetensors", {"weight": (1, 2)}, dtype="F32")
    _, found = diff(tmp_path / "first", tmp_path / "second", capsys=capsys)
    kinds = {each["name"]: each["kind"] for each in found["differences"]}
    assert kinds.pop("b", "values") == kinds.pop("c", "values") == "values"  # their bytes are others there
    assert kinds == {"a": "shape", "d": "missing", "e": "missing", "value_head/weight": "missing"}
    _, found = diff(tmp_path / "first", tmp_path / "third", capsys=capsys)
    assert {each["kind"] for each in found["differences"]} == {"dtype"}
    assert {each["elements"] for each in found["differences"]} == {6, 4, 2}
    assert main(["diff", str(tmp_path / "first"), str(tmp_path / "second")]) == 1
    text = capsys.readouterr().out
    assert "only in the first" in text
    assert "F32 [2, 3] and F32 [3, 2]" in text


def test_a_mistake_is_no_difference(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = write_checkpoint(tmp_path / "model")
    assert main(["diff", str(model), str(tmp_path / "nothing")]) == 2
    assert "is not a directory" in capsys.readouterr().err
