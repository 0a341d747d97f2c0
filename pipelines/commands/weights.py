"""Commands for checkpoints: reshard, diff."""

import argparse
import json
import time
from pathlib import Path

from rich.table import Table

from contracts.errors import UserError
from pipelines.commands.declaring import JSON, argument, command, make_console
from pipelines.environments.launch import EnvironmentConfig, ask
from pipelines.text import echo, format_megabytes, plural, relative_path
from reallocation.layouts import RankLayout
from reallocation.resharding import reshard
from reallocation.stored import StoredModel

BASE = argument("--base", type=Path, metavar="MODEL", help="base model of an adapter, if it does not name a directory")
DIFF_ENVIRONMENT = "training"
"""The environment whose numpy does the comparison."""


@command(
    "reshard",
    "shard a checkpoint for the ranks of a parallel layout, or merge it again",
    argument("checkpoint", type=Path, metavar="CHECKPOINT", help="a model's directory, whole or in any layout"),
    argument("--to", required=True, metavar="LAYOUT", help="like tp=4,pp=2; tp=1,pp=1: the whole original checkpoint"),
    argument("--output", type=Path, metavar="DIR", help="by default next to it, like NAME-tp4-pp2"),
    BASE,
    JSON,
    group="keep",
)
def _reshard(options: argparse.Namespace) -> None:
    layout = RankLayout.parse(options.to)
    path = options.checkpoint.resolve()
    if not path.is_dir():
        raise UserError(
            f"checkpoint {options.checkpoint} is not a directory. Give a model's, as save_pretrained writes it."
        )
    suffix = str(layout) if layout.ranks > 1 else "whole"
    target = options.output or path.with_name(f"{path.name}-{suffix.replace('=', '').replace(',', '-')}")
    start, begin = time.monotonic(), time.process_time()
    found = reshard(StoredModel(options.checkpoint, base=options.base), layout, target.absolute())
    seconds = time.monotonic() - start
    if options.json:
        result = {"output": str(target), "layout": str(layout), "files": found.files, "bytes": found.bytes}
        result |= {"ranks": found.ranks, "left_out": found.left_out, "was_there": found.was_there}
        result |= {"compared": found.compared}
        spent = round(time.process_time() - begin, 3)
        print(json.dumps({**result, "seconds": round(seconds, 3), "cpu_seconds": spent}))
        return
    console = make_console()
    if found.was_there:
        echo(console, f"{relative_path(target)} exists already.")
    else:
        what = f"{plural(found.files, 'file')} for {plural(found.ranks, 'rank')}, {format_megabytes(found.bytes)}"
        echo(console, f"{relative_path(target)}: {what} in {seconds:.1f} s")
    if found.compared == found.files:
        echo(console, "all files match the SHA-256 in the manifest")
    else:
        echo(
            console,
            "names, shapes and sizes are checked, bytes are not: digests to compare them with exist only for "
            "restored files of a run's checkpoint",
        )
    if found.left_out:
        echo(console, f"left out, other formats of the weights: {', '.join(found.left_out)}")


@command(
    "diff",
    "compare the tensors of two checkpoints; exit code 0: the same, 1: different",
    argument("first", type=Path, metavar="CHECKPOINT", help="a model's directory, whole or in any layout"),
    argument("second", type=Path, metavar="CHECKPOINT", help="another one"),
    BASE,
    JSON,
    group="read",
)
def _diff(options: argparse.Namespace) -> int:
    for path in (options.first, options.second):
        StoredModel(path, base=options.base)  # reports mistakes before the environment starts
    paths = [str(path.absolute()) for path in (options.first, options.second, options.base) if path is not None]
    found = json.loads(
        ask(EnvironmentConfig(), DIFF_ENVIRONMENT, ["-m", "reallocation", *paths], "compare checkpoints")
    )
    differences = found["differences"]
    if options.json:
        print(json.dumps(found))
        return int(bool(differences))
    console = make_console()
    if differences:
        table = Table()
        table.add_column("tensor")
        table.add_column("what")
        for title in ("differ", "of", "largest", "mean"):
            table.add_column(title, justify="right")
        for row in differences:
            table.add_row(*_table_row(row))
        console.print(table)
    echo(console, f"{len(differences)} of {plural(found['tensors'], 'tensor')} differ")
    return int(bool(differences))


def _table_row(row: dict[str, object]) -> list[str]:
    """One line of the table."""
    kind = str(row["kind"])
    if kind == "missing":
        kind = f"only in the {'first' if row['second'] is None else 'second'}"
    elif kind in ("shape", "dtype"):
        kind = f"{row['first']} and {row['second']}"
    if row["not_finite"]:
        kind += f"; {row['not_finite']} not finite"
    counts = ["" if row[name] is None else f"{row[name]:,}" for name in ("differ", "elements")]
    sizes = ["" if row[name] is None else f"{row[name]:.3g}" for name in ("largest", "mean")]
    return [str(row["name"]), kind, *counts, *sizes]
