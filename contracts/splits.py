"""Assigns the files of a directory to the splits of a data set by their names, as the Hub does."""

import re
from collections.abc import Iterable
from pathlib import Path

from contracts import yaml_text
from contracts.errors import UserError
from contracts.formats import is_readable, suffixes

KEYWORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""Words in the name of a file or folder that denote a split."""
ANY = ("data", "part", "shard", "chunk", "file", "rows", "default")
"""Words before a file's number that do not denote a split ("part-00000-of-00008.parquet")."""
METADATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "config.json")

_NUMBERED = re.compile(r"(\w+)-\d{5}-of-\d{5}")
_WORD = {word: split for split, words in KEYWORDS.items() for word in words}


def split_of(path: Path) -> str | None:
    """The split that the name of a file or parent folder denotes ("data/train-00000-of-00001.parquet"), or None."""
    stem = path.name.partition(".")[0]
    numbered = _NUMBERED.match(stem)
    if numbered and numbered[1].lower() not in ANY:
        return canonical_split(numbered[1])
    for part in (stem, *reversed(path.parent.parts)):
        words = re.split(r"[-._ ]+", part.lower())
        found = next((word.rstrip("0123456789") for word in words if word.rstrip("0123456789") in _WORD), None)
        if found is not None:
            others = words[1:] if part.lower().startswith(f"{found}_") else []
            # "train_sft" and "train_prefs" are two splits; "train_1" and "train_part2" are pieces of one.
            return (
                part if any(word.rstrip("0123456789") not in ("", "v", "of", *ANY) for word in others) else _WORD[found]
            )
    return None


def canonical_split(split: str) -> str:
    """The canonical name of a split: "validation" for "val" and "dev"."""
    return _WORD.get(split.lower(), split)


def choose_files(directory: Path, split: str) -> list[Path]:
    """The files of a split in a directory, sorted by name.

    Raises:
        UserError: there are none, or they are ambiguous; the message lists what there is.
    """
    found = sorted(
        path.relative_to(directory)
        for path in directory.rglob("*")
        if path.is_file() and is_readable(path) and path.name not in METADATA and not _is_hidden(path, directory)
    )
    if not found:
        raise UserError(f"{directory} holds no file that ends with {', '.join(suffixes())}. Name one that does.")
    if inner := _only_folder(directory, found):
        return choose_files(inner, split)
    by_split: dict[str | None, list[Path]] = {}
    for path in found:
        by_split.setdefault(split_of(path), []).append(path)
    there = "; ".join(f"{name or 'no split'}: {_some(paths)}" for name, paths in by_split.items())
    wanted: str | None = canonical_split(split)
    if wanted == "train" and None in by_split:
        if len(by_split) > 1:
            raise UserError(
                f"{directory} holds files of a split and files that name none ({there}). Name the file to read, or put "
                "the others into a folder of their own."
            )
        wanted = None
    if wanted not in by_split:
        raise UserError(
            f"{directory} holds no split {split!r} by the names of its files ({there}). Set split to one that is "
            "there, or name the file to read."
        )
    return [directory / path for path in by_split[wanted]]


def require_split_of_file(path: Path, split: str) -> None:
    """Raise UserError if a split other than train is requested that the file's name does not denote."""
    if canonical_split(split) not in ("train", split_of(Path(path.name))):
        raise UserError(
            f"{path} is one file, and split={split} chooses among files or the splits of a data set. Remove split, or "
            "name the directory, or the file of that split."
        )


def _only_folder(directory: Path, found: Iterable[Path]) -> Path | None:
    """The single folder that holds all the files, unless it is `data` or denotes a split.

    Raises:
        UserError: several folders may be configurations of a data set, or its README lists several configurations.
    """
    tops = {path.parts[0] if len(path.parts) > 1 else "" for path in found}
    folders = sorted(top for top in tops if top and top != "data" and split_of(Path(top) / "x") is None)
    if len(tops) == len(folders) == 1:
        return directory / folders[0]
    if folders:
        raise UserError(
            f"{directory} holds several configurations of a data set, or several data sets, in the folders "
            f"{', '.join(folders)}. Name one: source={directory / folders[0]}"
        )
    if len(configurations := _configurations(directory / "README.md")) > 1:
        raise UserError(
            f"{directory} holds the configurations {', '.join(configurations)} (README.md). Name one: "
            f"source=hf:{directory.absolute()}:{configurations[0]}"
        )
    return None


def _configurations(readme: Path) -> list[str]:
    """The configurations that the YAML header of a data set's README lists."""
    if not readme.is_file():
        return []
    _, *header = re.split(r"^---\s*$", readme.read_text(errors="replace"), maxsplit=2, flags=re.MULTILINE)
    try:
        listed = (yaml_text.load(header[0]) or {}).get("configs") if len(header) > 1 else None
    except (yaml_text.YamlError, AttributeError):  # a README may contain anything
        return []
    return [str(entry["config_name"]) for entry in listed or [] if isinstance(entry, dict) and "config_name" in entry]


def _is_hidden(path: Path, directory: Path) -> bool:
    return any(part.startswith((".", "_")) for part in path.relative_to(directory).parts)


def _some(paths: list[Path]) -> str:
    shown = ", ".join(path.as_posix() for path in paths[:3])
    return shown if len(paths) <= 3 else f"{shown} and {len(paths) - 3} more"
