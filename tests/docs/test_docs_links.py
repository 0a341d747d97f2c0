"""The documentation speaks of what exists: linked files, named scripts and configs, keys in commands, error texts."""

import re
import subprocess
from pathlib import Path

import pytest
import yaml

from annotation.config import CheckpointEvaluationConfig, EvaluationConfig
from annotation.data.mixing import PairsSampleConfig, PreferencesImportConfig, PreferencesScoresConfig
from annotation.data.selection import SelectConfig, SelectScoresConfig
from annotation.pairing.config import PairsConfig
from annotation.scorers import CONFIGS
from contracts.config import StageConfig
from contracts.declaration import stages_of
from contracts.mixture import DrawConfig
from contracts.prompts import PromptsConfig
from generation.config import GenerationConfig
from training.config import (
    CriticConfig,
    EmaConfig,
    ExperienceConfig,
    MergeConfig,
    PolicyConfig,
    RewardConfig,
    SftConfig,
    ValueHeadConfig,
)

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MIXING = (PreferencesImportConfig, PreferencesScoresConfig, PairsSampleConfig, SelectConfig, SelectScoresConfig)
STAGES: dict[str, list[type[StageConfig]]] = {
    "contracts": [PromptsConfig, DrawConfig],
    "generation": [GenerationConfig],
    "annotation": [*CONFIGS.values(), PairsConfig, EvaluationConfig, CheckpointEvaluationConfig, *MIXING],
    "training": [
        SftConfig,
        RewardConfig,
        ExperienceConfig,
        PolicyConfig,
        CriticConfig,
        EmaConfig,
        MergeConfig,
        ValueHeadConfig,
    ],
}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_named_files_exist(page: Path) -> None:
    text = page.read_text()
    links = [link for link in re.findall(r"\]\(([^)#]+)", text) if "://" not in link]
    assert [link for link in links if not (page.parent / link).exists()] == []
    named = re.findall(r"\b(?:scripts|configs)/[\w./-]+\.(?:sh|yaml)", text)
    assert [name for name in named if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_keys_in_commands_exist(page: Path) -> None:
    for package, arguments in re.findall(r"python -m (\w+)((?: [^`\n]*)?)", page.read_text()):
        if package not in STAGES:
            continue
        known = {name for config in STAGES[package] for name in config.model_fields}
        used = re.findall(r"\b([a-z_]+)=", arguments)
        assert set(used) <= known, f"{page.name}: python -m {package}{arguments}"


def test_scripts_name_stages_that_exist() -> None:
    text = "\n".join(path.read_text() for path in [*PAGES, *sorted((ROOT / "scripts").glob("*.sh"))])
    named = set(re.findall(r'train\.sh"? ([a-z][a-z-]*)', text)) | set(
        re.findall(r"python -m training ([a-z][a-z-]*)", text)
    )
    assert {"policy", "sft"} <= named <= set(stages_of("training"))


def test_error_texts_are_ones_that_the_code_has() -> None:
    table = re.findall(r"^\| `([^`]+)` \|", (ROOT / "docs/troubleshooting.md").read_text(), re.MULTILINE)
    assert len(table) > 10
    packages = ("annotation", "contracts", "generation", "modeling", "pipelines", "reallocation", "training")
    sources = "\n".join(path.read_text() for package in packages for path in (ROOT / package).rglob("*.py"))
    joined = re.sub(r'"\s*\n\s*(?:\+ )?f?"', "", sources)  # strings that the code breaks over lines
    for text in table:
        pieces = [piece.strip(" .;:") for piece in re.split(r"\.\.\.|\b[NMAB]\b|'[^']*'|=[\d.]+|\b\d\b|\bnan\b", text)]
        longest = max(pieces, key=len)
        assert longest in joined, f"no code says {longest!r}"


def test_the_repository_names_no_machine() -> None:
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    pattern = re.compile(r"(?<![\w.])/(?:work|root|home)/\w+|files\.python" + r"hosted|py" + r"pi\.org")
    found = [
        name
        for name in files
        if name != "LICENSE" and (ROOT / name).suffix in {".py", ".md", ".sh", ".yaml", ".toml", ".txt", ".in"}
        if pattern.search((ROOT / name).read_text())
    ]
    assert found == []


def test_recipes_explain_themselves() -> None:
    for recipe in sorted((ROOT / "configs").glob("*.yaml")):
        text = recipe.read_text()
        assert text.startswith("# "), f"{recipe.name} does not begin with what it is"
        assert yaml.safe_load(text)["name"] == recipe.stem
