"""Compares the time to reshard a checkpoint with that of copying its files.

    .venv/bin/python benchmarks/reshard.py                       # a checkpoint of random bytes, 2.3 GB
    .venv/bin/python benchmarks/reshard.py --checkpoint DIR --to tp=4,pp=2 --rounds 5

Every round measures `cp` with a flush of its files to the disk, `pipeline reshard` to the layout, and `pipeline
reshard` back, in random order, each into a new directory. `pipeline reshard` flushes its files too; its start is not
counted. The last line is one JSON object; the ratios to cp are computed within each round, and their medians reported.
The exit code is 1 if the restored checkpoint differs from the original.
"""

import argparse
import filecmp
import json
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # before this folder, whose training.py is not the package

Spent = tuple[float, float]
"""Wall seconds, and CPU seconds (user and system), which depend less on other load."""
LAYERS, HIDDEN, INNER, HEADS, KEY_HEADS, WIDTH, VOCABULARY = 4, 4096, 14336, 32, 8, 128, 32000
"""The shape of Mistral-7B, with fewer layers."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, help="by default one of random bytes with the shapes of Mistral-7B")
    parser.add_argument("--layers", type=int, default=LAYERS, help="layers of the random checkpoint")
    parser.add_argument("--to", default="tp=4,pp=2")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where to write; by default the system's temporary directory")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        place = Path(folder)
        model = options.checkpoint or make_checkpoint(place / "model", options.layers)
        weights = sorted(model.glob("*.safetensors"))
        reshard(model, options.to, place / "divided")  # the source for resharding back; also warms the page cache
        whole = reshard(place / "divided", "tp=1", place / "whole")
        same = all(filecmp.cmp(file, place / "whole" / file.name, shallow=False) for file in weights)
        shutil.rmtree(place / "whole")
        contestants: dict[str, Callable[[Path], Spent]] = {
            "cp": lambda target: copy(weights, target),
            "there": lambda target: reshard(model, options.to, target),
            "back": lambda target: reshard(place / "divided", "tp=1", target),
        }
        rounds: list[dict[str, Spent]] = []
        for number in range(options.rounds):
            names = list(contestants)
            random.Random(number).shuffle(names)
            rounds.append({})
            for name in names:
                rounds[-1][name] = contestants[name](place / "target")
                shutil.rmtree(place / "target")
            parts = (f"{name} {spent[0]:.2f} s, {spent[1]:.2f} CPU-s" for name, spent in sorted(rounds[-1].items()))
            print("; ".join(parts), flush=True)
        ratios = {
            what: {
                name: statistics.median(each[name][number] / each["cp"][number] for each in rounds)
                for name in ("there", "back")
            }
            for number, what in enumerate(("seconds", "cpu_seconds"))
        }
        size = sum(file.stat().st_size for file in weights)
        written = sum(file.stat().st_size for file in (place / "divided").glob("*.safetensors"))
    figures = {"layout": options.to, "bytes": size, "bytes_written": written, "first_way_back": whole[0]}
    print(json.dumps({**figures, "same": same, "rounds": rounds, "ratio_to_cp": ratios}))
    return 0 if same else 1


def reshard(model: Path, layout: str, target: Path) -> Spent:
    """Reshard a checkpoint. Returns the time that the command reports, from reading headers to flushing the last
    file."""
    command = [
        sys.executable,
        "-m",
        "pipelines",
        "reshard",
        str(model),
        "--to",
        layout,
        "--output",
        str(target),
        "--json",
    ]
    output = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE).stdout
    report = json.loads(output)
    return report["seconds"], report["cpu_seconds"]


def copy(files: Sequence[Path], target: Path) -> Spent:
    """Copy files with cp and flush the copies. Returns the time of both."""
    target.mkdir()
    start, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(["cp", *map(str, files), str(target)], check=True)
    subprocess.run(["sync", *(str(target / file.name) for file in files)], check=True)
    seconds, after = time.monotonic() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def make_checkpoint(path: Path, layers: int) -> Path:
    """Write a Llama checkpoint of random bytes."""
    path.mkdir()
    query, key = HEADS * WIDTH, KEY_HEADS * WIDTH
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for layer in range(layers):
        for name, shape in {
            "input_layernorm.weight": (HIDDEN,), "mlp.down_proj.weight": (HIDDEN, INNER),
            "mlp.gate_proj.weight": (INNER, HIDDEN), "mlp.up_proj.weight": (INNER, HIDDEN),
            "post_attention_layernorm.weight": (HIDDEN,), "self_attn.k_proj.weight": (key, HIDDEN),
            "self_attn.o_proj.weight": (HIDDEN, query), "self_attn.q_proj.weight": (query, HIDDEN),
            "self_attn.v_proj.weight": (key, HIDDEN),
        }.items():  # fmt: skip
            shapes[f"model.layers.{layer}.{name}"] = shape
    shapes |= {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCABULARY, HIDDEN)}
    entries, place = {}, 0
    for name, shape in shapes.items():
        size = 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)
        entries[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [place, place + size]}
        place += size
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    rng = random.Random(0)
    with (path / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        while place:
            file.write(rng.randbytes(min(place, 16 << 20)))
            place -= min(place, 16 << 20)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN, "head_dim": WIDTH,
        "num_hidden_layers": layers, "num_attention_heads": HEADS, "num_key_value_heads": KEY_HEADS,
        "intermediate_size": INNER, "vocab_size": VOCABULARY, "tie_word_embeddings": False,
    }  # fmt: skip
    (path / "config.json").write_text(json.dumps(config))
    return path


if __name__ == "__main__":
    sys.exit(main())
