"""What `dtype: auto` stands for, by the processor's own words; one choice for all processes of a stage."""

import json
import multiprocessing
import os
from pathlib import Path

import pytest

from contracts import precision
from contracts.precision import resolve_dtype
from contracts.publication import Publication
from contracts.records import ROLLOUTS
from contracts.stage import Context
from contracts.workers import agree

PROCESSORS = {
    "x86 with AVX512-BF16": ("flags\t\t: fpu avx512f avx512_bf16 fsrm\n", True),
    "x86 with AMX": ("flags\t\t: fpu amx_tile amx_bf16\n", True),
    "x86 with neither": ("flags\t\t: fpu avx512f avx512bw\nbugs\t\t: bf16\n", False),
    "ARM": ("processor\t: 0\nFeatures\t: fp asimd bf16 i8mm\n", True),
    "old ARM": ("Features\t: fp asimd\n", False),
    "unknown": ("", False),
}


@pytest.mark.parametrize("name", PROCESSORS)
@pytest.mark.parametrize("stored", [{"dtype": "bfloat16"}, {"torch_dtype": "float16"}, {"torch_dtype": "float32"}, {}])
def test_auto_asks_the_processor(
    name: str, stored: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, native = PROCESSORS[name]
    (tmp_path / "cpuinfo").write_text(text)
    (tmp_path / "config.json").write_text(json.dumps(stored))
    monkeypatch.setattr(precision, "CPU_INFO", tmp_path / "cpuinfo")
    half = native and "float32" not in stored.values() and stored != {}
    assert resolve_dtype("auto", on_gpu=False, sampled=tmp_path) == ("bfloat16" if half else "float32")
    assert resolve_dtype("auto", on_gpu=False) == "float32"  # what is trained, and what is compared with it
    assert resolve_dtype("auto", on_gpu=True) == "bfloat16"
    assert resolve_dtype("float16", on_gpu=False, sampled=tmp_path) == "float16"


def choose(output: Path, name: str, start: "multiprocessing.synchronize.Event") -> None:
    start.wait()
    context = Context(Publication(output, ROLLOUTS, "generation", "key"), 1, 9, "task")
    Path(f"{output}-{name}").write_text(agree(context, "dtype", name))


def test_all_processes_of_a_stage_agree(tmp_path: Path) -> None:
    """Tasks on machines that would choose differently start at the same instant; one that starts later follows."""
    publication = Publication(tmp_path / "out", ROLLOUTS, "generation", "key")
    publication.directory.mkdir(parents=True)
    assert publication.state.is_dir()
    context = multiprocessing.get_context("fork")
    start = context.Event()
    tasks = [context.Process(target=choose, args=(tmp_path / "out", f"format{number}", start)) for number in range(6)]
    for task in tasks:
        task.start()
    start.set()
    for task in tasks:
        task.join()
    found = {path.read_text() for path in tmp_path.glob("out-format*")}
    assert len(found) == 1
    assert len(os.listdir(tmp_path)) == 6 + 1
    assert agree(Context(publication, 1, 9, "task"), "dtype", "later") == found.pop()
