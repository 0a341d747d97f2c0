"""What must never happen: code that runs because a file was read, names that lead out of a run, secrets in files."""

import ast
import json
from pathlib import Path

import msgspec
import pytest

import contracts
from contracts.artifacts import Artifact
from contracts.config import validate
from contracts.errors import UserError
from contracts.ledger import Ledger
from contracts.manifest import MANIFEST
from contracts.prompts import PromptsConfig
from contracts.publication import Publication
from contracts.records import PROMPTS
from pipelines.config.load import load_run_config
from pipelines.environments.launch import EnvironmentConfig

ROOT = Path(contracts.__file__).parents[1]
PACKAGES = ("annotation", "contracts", "embedded", "generation", "modeling", "pipelines", "reallocation", "training")
UNPICKLERS = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
SECRET = "hf_" + "QqSecretQq" * 4


def sources() -> list[Path]:
    return [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


@pytest.mark.parametrize("path", sources(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_module_can_read_a_pickle_or_run_a_models_own_code(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            assert not UNPICKLERS & {name.partition(".")[0] for name in names}, f"line {node.lineno}"
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in ("torch.load", "numpy.load", "np.load", "yaml.unsafe_load"), f"line {node.lineno}"
            if called.startswith("yaml.") and "load" in called:
                assert path.name == "yaml_text.py", f"line {node.lineno}: contracts.yaml_text reads YAML"
        if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
            assert ast.unparse(node.value) == "False", f"line {node.value.lineno}"


@pytest.mark.parametrize("name", ["../elsewhere", "/tmp/elsewhere", "a/b", ".hidden", "", "a\nb", ".."])
def test_a_runs_name_cannot_lead_out_of_its_directory(smallest: Path, name: str) -> None:
    with pytest.raises(UserError, match="name"):
        load_run_config(smallest, [f"name={json.dumps(name)}"])


@pytest.mark.parametrize("name", ["../../elsewhere", "/etc/passwd", "shard/../../x"])
def test_a_manifest_cannot_name_files_outside_of_its_directory(tmp_path: Path, name: str) -> None:
    publication = Publication(tmp_path / "out", PROMPTS, "prompts", "k" * 64)
    publication.begin()
    publication.write_rows("shard-00000.jsonl", [], Ledger("prompts"))
    facts = {"unit": "prompts", "weights": None, "versions": {}, "seconds": {}, "facts": {}}
    publication.publish(key_parts={}, inputs={}, input_paths={}, **facts)
    manifest = tmp_path / "out" / MANIFEST
    content = json.loads(manifest.read_bytes())
    content["files"][0]["path"] = name
    content["checksum"] = ""
    text = msgspec.json.format(msgspec.json.encode(content), indent=1) + b"\n"
    checksum = contracts.fingerprint.hashlib.sha256(text).hexdigest().encode()
    manifest.write_bytes(text.replace(b'"checksum": ""', b'"checksum": "%s"' % checksum))
    with pytest.raises(UserError, match="not inside its directory"):
        Artifact.open(tmp_path / "out")


@pytest.mark.parametrize(
    "overrides",
    [
        [f"policy={SECRET}"],
        [f"environments.training.variables.WHATEVER={SECRET}"],
        ["environments.training.variables.WANDB_API_KEY=0123456789"],
        [f"scorers.reward.model=https://user:{SECRET}@host/model"],
    ],
)
def test_a_secret_in_a_configuration_is_refused_and_not_repeated(smallest: Path, overrides: list[str]) -> None:
    with pytest.raises(UserError, match="looks like a secret") as refusal:
        load_run_config(smallest, overrides)
    assert SECRET not in str(refusal.value)
    assert "0123456789" not in str(refusal.value)


def test_ordinary_keys_are_no_secrets() -> None:
    validate(EnvironmentConfig, {"variables": {"TOKENIZERS_PARALLELISM": "false", "MAX_TOKENS": "5"}}, "test")
    validate(PromptsConfig, {"source": "hf:org/hf_tiny_sk-model", "output": "x"}, "test")
