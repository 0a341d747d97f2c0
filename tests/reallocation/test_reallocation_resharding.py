"""`pipeline reshard`: a set of files for each rank and back, bit for bit, whatever kills it."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from handmade_checkpoints import config_of, contents, shapes_of, write_checkpoint, write_safetensors

from contracts.errors import UserError
from contracts.fingerprint import file_sha256
from contracts.ledger import Ledger
from contracts.manifest import MANIFEST, File, Manifest, with_checksum
from contracts.models import ModelInfo
from contracts.records import Schema
from contracts.weights import read_header
from pipelines.main import main
from reallocation import resharding, writing
from reallocation.layouts import RankLayout
from reallocation.resharding import reshard
from reallocation.stored import RECORD, StoredModel

LAYOUTS = ["tp=2,pp=2", "tp=4", "pp=3", "pp=2,layers=1+2", "dp=2,shard=rows", "dp=3,shard=flat", "dp=2,tp=2,shard=rows"]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "model", files=2, remainders=True)


def to(checkpoint: Path, layout: str, output: Path) -> Path:
    assert main(["reshard", str(checkpoint), "--to", layout, "--output", str(output)]) == 0
    return output


@pytest.mark.parametrize("layout", LAYOUTS)
def test_there_and_back_gives_the_same_files(model: Path, layout: str, tmp_path: Path) -> None:
    divided = to(model, layout, tmp_path / "divided")
    assert contents(to(divided, "tp=1,pp=1", tmp_path / "back")) == contents(model)


def test_from_one_layout_to_another(model: Path, tmp_path: Path) -> None:
    direct = to(model, "pp=3", tmp_path / "direct")
    for number, layout in enumerate(LAYOUTS):
        divided = to(model, layout, tmp_path / f"divided-{number}")
        there, wanted = contents(to(divided, "pp=3", tmp_path / f"there-{number}")), contents(direct)
        record, known = (json.loads(each.pop(RECORD)) for each in (there, wanted))
        assert there == wanted
        assert record | {"key": ""} == known | {"key": ""}


def test_each_rank_has_what_its_layout_says(model: Path, tmp_path: Path) -> None:
    divided = to(model, "tp=2,pp=2", tmp_path / "divided")
    record = json.loads((divided / RECORD).read_bytes())
    whole = StoredModel(model)
    division = whole.division(RankLayout(tp=2, pp=2))
    assert record["layout"] == "tp=2,pp=2"
    assert record["ranks"].keys() == {"0", "1", "2", "3"}
    for rank, files in record["ranks"].items():
        held = {name: tensor for file in files for name, tensor in read_header(divided / file).items()}
        wanted = division.parts_of_rank(int(rank))
        assert held.keys() == {name.removeprefix("master/") for name in wanted}
        for file in files:
            prefix = "master/" if file.startswith("master/") else ""
            for name, tensor in read_header(divided / file).items():
                assert tensor.shape == wanted[prefix + name].shape
                content = bytearray(tensor.end - tensor.start)
                whole.read(prefix + name, wanted[prefix + name], memoryview(content))
                assert (divided / file).read_bytes()[tensor.start : tensor.end] == content
    assert {path.name for path in divided.iterdir()} == {
        RECORD, "config.json", "tokenizer.json", "origin", "master",
        *(f"model-rank-{rank}-part-0.safetensors" for rank in range(4)),
    }  # fmt: skip


def test_columns_are_cut_out_of_every_row(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "model")
    to(model, "tp=2", tmp_path / "divided")
    name = "model.layers.0.mlp.down_proj.weight"  # [16, 24] of two bytes
    stored = read_header(model / "model.safetensors")[name]
    whole = (model / "model.safetensors").read_bytes()[stored.start : stored.end]
    file = tmp_path / "divided/model-rank-1-part-0.safetensors"
    found = read_header(file)[name]
    rows = [whole[48 * row : 48 * row + 48] for row in range(16)]
    assert file.read_bytes()[found.start : found.end] == b"".join(row[24:] for row in rows)


def test_a_stage_that_is_given_one_says_how_to_make_it_whole(model: Path, tmp_path: Path) -> None:
    divided = to(model, "tp=2", tmp_path / "divided")
    with pytest.raises(UserError, match=r"pipeline reshard .* --to tp=1"):
        ModelInfo.read(divided)


def test_replicas_share_their_files(model: Path, tmp_path: Path) -> None:
    divided = to(model, "dp=2,pp=2", tmp_path / "divided")
    record = json.loads((divided / RECORD).read_bytes())
    assert record["ranks"].keys() == {"0", "2"}
    assert record["replicas"] == {"1": 0, "3": 2}


def test_files_of_a_rank_are_not_larger_than_the_limit(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resharding, "FILE_BYTES", 3000)
    divided = to(model, "tp=2", tmp_path / "divided")
    assert len(list(divided.glob("model-rank-0-part-*.safetensors"))) > 2
    assert all(path.stat().st_size < 3000 + 2000 for path in divided.glob("*.safetensors"))  # beside the header
    assert contents(to(divided, "tp=1", tmp_path / "back")) == contents(model)


@pytest.mark.parametrize("copies", [True, False], ids=["kernel", "refused"])
@pytest.mark.parametrize(("window", "gap"), [(100, 100), (1 << 20, 100), (1 << 20, 0)])
@pytest.mark.parametrize("takes", [None, 50], ids=["all", "a-part"])
def test_long_and_short_ranges(
    copies: bool, window: int, gap: int, takes: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Columns are cut out of windows of rows, or read one by one; long ranges are read, or copied by the kernel where
    pages lie as in the new file; and the kernel may write less than it is given."""
    asked: list[int] = []
    most = 0
    copy, pwritev = os.copy_file_range, os.pwritev

    def copy_range(source: int, target: int, count: int, *places: int) -> int:
        asked.append(count)
        if not copies:
            raise OSError(18, "Invalid cross-device link")
        return copy(source, target, count, *places)

    def write(target: int, ranges: list[memoryview], place: int) -> int:
        nonlocal most
        most = max(most, len(ranges))
        return pwritev(target, ranges, place) if takes is None else os.pwrite(target, b"".join(ranges)[:takes], place)

    monkeypatch.setattr(os, "copy_file_range", copy_range)
    monkeypatch.setattr(os, "pwritev", write)
    for name, value in {
        "LONG": 600, "PAGES": 8, "BUFFER": 128, "COPY_AT_ONCE": 256, "WINDOW": window, "GAP": gap, "RANGES": 7,
    }.items():  # fmt: skip
        monkeypatch.setattr(writing, name, value)
    model = write_checkpoint(tmp_path / "model", files=2)
    divided = to(model, "tp=4,pp=2", tmp_path / "divided")
    assert contents(to(divided, "tp=1", tmp_path / "back")) == contents(model)
    assert len(asked) >= 3
    assert all(count % 8 == 0 for count in asked)
    assert most >= 4


def test_a_file_that_is_cut_off_meanwhile(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = writing._Writer.write

    def write(self: Any, *arguments: Any, **options: Any) -> str | None:
        for path in model.glob("*.safetensors"):
            os.truncate(path, 5000)
        return real(self, *arguments, **options)

    monkeypatch.setattr(writing._Writer, "write", write)
    assert main(["reshard", str(model), "--to", "tp=2", "--output", str(tmp_path / "out")]) == 2
    assert "is truncated: it ends before byte" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_adapter(tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "base")
    shapes = {
        f"base_model.model.model.layers.{layer}.{name}": shape
        for layer in range(3)
        for name, shape in {
            "self_attn.q_proj.lora_A.weight": (2, 16), "self_attn.q_proj.lora_B.weight": (16, 2),
            "mlp.down_proj.lora_A.weight": (2, 24), "mlp.down_proj.lora_B.weight": (16, 2),
        }.items()
    }  # fmt: skip
    adapter = tmp_path / "adapter"
    write_safetensors(adapter / "adapter_model.safetensors", shapes, dtype="F32")
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "org/name"}))
    assert main(["reshard", str(adapter), "--to", "tp=2"]) == 2
    output = tmp_path / "divided"
    arguments = ["reshard", str(adapter), "--to", "tp=2,pp=3", "--output", str(output), "--base", str(base)]
    assert main(arguments) == 0
    held = read_header(output / "model-rank-5-part-0.safetensors")
    assert {name.removeprefix("base_model.model.model.layers.2."): tensor.shape for name, tensor in held.items()} == {
        "self_attn.q_proj.lora_A.weight": (2, 16), "self_attn.q_proj.lora_B.weight": (8, 2),
        "mlp.down_proj.lora_A.weight": (2, 12), "mlp.down_proj.lora_B.weight": (16, 2),
    }  # fmt: skip
    assert contents(to(output, "tp=1", tmp_path / "back")) == contents(adapter)


def test_the_same_command_again_says_so(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    divided = to(model, "tp=2", tmp_path / "divided")
    before = {path: path.stat().st_mtime_ns for path in divided.rglob("*")}
    to(model, "tp=2", divided)
    assert "exists already" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in divided.rglob("*")} == before
    to(divided, "tp=1", tmp_path / "back")
    to(divided, "tp=1", tmp_path / "back")
    assert "exists already" in capsys.readouterr().out


def test_an_output_that_is_something_else_is_left_alone(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    divided = to(model, "tp=2", tmp_path / "divided")
    before = contents(divided)
    for layout in ("tp=4", "tp=1"):
        assert main(["reshard", str(model), "--to", layout, "--output", str(divided)]) == 2
        assert "exists with other content" in capsys.readouterr().err
    assert contents(divided) == before
    assert not list(tmp_path.glob(".*"))


KILLED = """
import os, signal, sys
from pathlib import Path
from reallocation import resharding
from reallocation.layouts import RankLayout
from reallocation.stored import StoredModel

left = int(sys.argv[4])
def counting(name):
    real = getattr(os, name)
    def call(*arguments, **options):
        global left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments, **options)
    return call
for name in ("pwritev", "replace", "rename", "fsync", "unlink"):
    setattr(os, name, counting(name))
resharding.reshard(StoredModel(Path(sys.argv[1])), RankLayout.parse(sys.argv[2]), Path(sys.argv[3]))
print(left)
"""


def test_killed_at_any_instant_it_goes_on(model: Path, tmp_path: Path) -> None:
    """Each start is killed some system calls later than its beginning, until one ends."""
    expected = contents(to(model, "tp=2", tmp_path / "expected"))
    output = tmp_path / "output"
    rng = random.Random(0)
    kills = 0
    while not output.exists():
        assert kills < 40
        arguments = [str(model), "tp=2", str(output), str(rng.randint(8, 40))]
        done = subprocess.run([sys.executable, "-c", KILLED, *arguments], capture_output=True, text=True, check=False)
        assert done.returncode in (0, -signal.SIGKILL), done.stderr
        kills += done.returncode != 0
    to(model, "tp=2", output)
    assert kills > 1
    assert contents(output) == expected
    assert not list(tmp_path.glob(".output*"))


def test_finished_files_are_not_written_again(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Any, *arguments: Any) -> None:
        raise InterruptedError

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfile", refuse)  # all weights are written, the other files are not
        with pytest.raises(InterruptedError):
            reshard(StoredModel(model), RankLayout(tp=2), tmp_path / "out")
    time.sleep(0.01)
    began = time.time_ns()
    found = reshard(StoredModel(model), RankLayout(tp=2), tmp_path / "out")
    written = [path.name for path in found.path.rglob("*.safetensors") if path.stat().st_mtime_ns > began]
    assert written == []


def test_another_process_that_writes_it_is_told(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def meanwhile(self: Any, *arguments: Any, **options: Any) -> None:
        with pytest.raises(UserError, match="another process is making"):
            reshard(StoredModel(model), RankLayout(tp=2), tmp_path / "out")
        raise InterruptedError

    monkeypatch.setattr(writing._Writer, "write", meanwhile)
    with pytest.raises(InterruptedError):
        reshard(StoredModel(model), RankLayout(tp=2), tmp_path / "out")


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda model: (model / "config.json").unlink(), "it has no config.json"),
        (
            lambda model: (model / "config.json").write_text(json.dumps(config_of(architectures=["X"]))),
            "is a X; tensor and pipeline",
        ),
        (lambda model: os.truncate(model / "model-00001-of-00002.safetensors", 900), "cut off or damaged"),
        (lambda model: (model / "model.safetensors.index.json").unlink(), "has neither model.safetensors nor"),
        (
            lambda model: (model / "config.json").write_text(json.dumps(config_of(num_hidden_layers=2))),
            "has 2 layers according to",
        ),
    ],
)
def test_mistakes(model: Path, break_it: Any, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    break_it(model)
    assert main(["reshard", str(model), "--to", "tp=2"]) == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in model.parent.iterdir()] == ["model"]


def test_a_divided_checkpoint_that_lacks_a_file(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    divided = to(model, "tp=2", tmp_path / "divided")
    (divided / "model-rank-1-part-0.safetensors").unlink()
    assert main(["reshard", str(divided), "--to", "tp=1"]) == 2
    assert "lacks model-rank-1-part-0.safetensors" in capsys.readouterr().err
    (divided / RECORD).write_bytes((divided / RECORD).read_bytes().replace(b"model-rank-1", b"../model-rank"))
    assert main(["reshard", str(divided), "--to", "tp=1"]) == 2
    assert "names files outside of its directory" in capsys.readouterr().err


@pytest.mark.slow
def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """The same peak for a checkpoint of 4 MB and one of 100 MB, whose ranges are long and short ones."""
    peaks = []
    for words, width in ((512, 512), (8192, 4096)):
        model = tmp_path / str(words)
        config = config_of(
            hidden_size=1024, intermediate_size=width, vocab_size=words, head_dim=16, num_hidden_layers=1
        )
        write_safetensors(model / "model.safetensors", shapes_of(config))
        (model / "config.json").write_text(json.dumps(config))
        program = (
            "import sys; from pipelines.main import main; "
            "assert main(['reshard', sys.argv[1], '--to', 'tp=4', '--output', sys.argv[2]]) == 0; "
            "print(*(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"
        )
        command = [sys.executable, "-c", program, str(model), str(tmp_path / f"{words}-divided")]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        peaks.append(int(output.splitlines()[-1]) << 10)
    sizes = [(tmp_path / str(words) / "model.safetensors").stat().st_size for words in (512, 8192)]
    assert sizes[1] - sizes[0] > 30e6
    assert peaks[1] - peaks[0] < 16 << 20


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        (None, "lacks model.layers.1.mlp.up_proj.weight, which a LlamaForCausalLM of 3 layers has"),
        (
            (23, 16),
            r"layers.1.mlp.up_proj.weight of .* has shape \[23, 16\], but config.json implies \[24, 16\]",
        ),
    ],
)
@pytest.mark.parametrize("layout", ["tp=1", "tp=2", "dp=2,shard=rows"])
def test_a_model_that_is_not_what_its_config_says(
    tmp_path: Path, layout: str, shape: tuple[int, ...] | None, said: str
) -> None:
    model = write_checkpoint(tmp_path / "model")
    shapes = shapes_of(config_of())
    name = "model.layers.1.mlp.up_proj.weight"
    del shapes[name]
    write_safetensors(model / "model.safetensors", shapes | ({name: shape} if shape else {}))
    with pytest.raises(UserError, match=said):
        reshard(StoredModel(model), RankLayout.parse(layout), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_head_and_vocabulary_have_the_same_rows(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "model", tie_word_embeddings=False)
    shapes = shapes_of(config_of(tie_word_embeddings=False))
    write_safetensors(model / "model.safetensors", shapes | {"lm_head.weight": (69, 16)})
    with pytest.raises(UserError, match=r"lm_head.weight .* shape \[69, 16\], but config.json implies \[70, 16\]"):
        reshard(StoredModel(model), RankLayout(tp=2), tmp_path / "out")


@pytest.mark.parametrize(
    ("layout", "said"),
    [
        ("dp=1000000,shard=rows", "has 1,000,000 ranks, but at most 65,536 are supported"),
        ("dp=71,shard=rows", "no tensor of .* has more than 70 rows, .* Set dp to at most 70"),
        ("tp=2,tp=4", "'tp' occurs twice. Give it once"),
        ("tpp=2", "'tpp' is not a key. Did you mean 'tp'"),
        ("", "is empty"),
    ],
)
def test_layouts_that_make_no_sense(model: Path, tmp_path: Path, layout: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        reshard(StoredModel(model), RankLayout.parse(layout), tmp_path / "out")


def test_tensors_that_lie_upon_each_other(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Names, shapes and sizes of a rank's file are right, and still not all of its bytes are of one tensor."""
    divided = to(model, "tp=2", tmp_path / "divided")
    file = divided / "model-rank-0-part-0.safetensors"
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    names = [f"model.layers.{layer}.mlp.up_proj.weight" for layer in (0, 1)]
    header[names[1]]["data_offsets"] = header[names[0]]["data_offsets"]
    file.write_bytes(
        content[:8] + json.dumps(header, separators=(",", ":")).encode().ljust(length) + content[8 + length :]
    )
    assert main(["reshard", str(divided), "--to", "tp=1"]) == 2
    assert f"{names[1]} begins at byte" in capsys.readouterr().err


def test_what_is_checked_is_said(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    publish(model)
    divided = to(model, "tp=2", tmp_path / "divided")
    assert "names, shapes and sizes are checked, bytes are not" in " ".join(capsys.readouterr().out.split())
    to(divided, "tp=1", tmp_path / "back")
    assert "all files match the SHA-256 in the manifest" in " ".join(capsys.readouterr().out.split())
    to(divided, "tp=1", tmp_path / "back")
    assert "bytes are not" in " ".join(capsys.readouterr().out.split())


def publish(model: Path) -> None:
    """Give a checkpoint the manifest of a run."""
    files = tuple(
        File(path.relative_to(model).as_posix(), file_sha256(path), path.stat().st_size)
        for path in sorted(model.rglob("*"))
        if path.is_file()
    )
    manifest = Manifest(
        Schema("policy", 1), "policy", "key", {}, "digest", {}, {}, 0, Ledger("steps"), files, None, {}, {}, {}, {}, ""
    )
    (model / MANIFEST).write_bytes(with_checksum(manifest))


def test_a_damaged_rank_file_is_told_where_the_checkpoint_was_published(model: Path, tmp_path: Path) -> None:
    publish(model)
    divided = to(model, "tp=2", tmp_path / "divided")
    assert contents(to(divided, "tp=1", tmp_path / "back")) == contents(model)
    file = divided / "model-rank-0-part-0.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match="differs from the published file"):
        reshard(StoredModel(divided), RankLayout(), tmp_path / "damaged")
    assert not (tmp_path / "damaged").exists()


def test_a_place_that_takes_no_directories(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It says that it does not exist, like one that another process has deleted."""
    assert main(["reshard", str(model), "--to", "tp=2", "--output", "/proc/out"]) == 2
    assert "/proc/out cannot be created: no directory can be created in /proc." in capsys.readouterr().err
