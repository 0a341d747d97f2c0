"""Models named by a Hub id: downloaded once, then a directory like any other.

The Hub's library is loaded where a model is on the Hub: it takes longer to load than all of this command.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from contracts.errors import UserError
from pipelines.config.run import RunConfig

MODEL_PATTERNS = ["*.json", "*.safetensors", "*.jinja", "*.model", "merges.txt", "vocab.txt"]


def with_models(config: RunConfig, place: Callable[[str], str]) -> RunConfig:
    """The same configuration with every model where `place`, which is `fetch` or `cached`, says."""
    scorers = {}
    for name, scorer in config.scorers.items():
        update: dict[str, Any] = {}
        if scorer.model:
            update["model"] = Path(place(str(scorer.model)))
        if scorer.inputs:
            update["inputs"] = [Path(place(str(path))) for path in scorer.inputs]
        scorers[name] = scorer.model_copy(update=update)
    changes: dict[str, Any] = {"policy": place(config.policy), "scorers": scorers}
    if inputs := config.training.inputs:
        placed = [Path(place(str(path))) for path in inputs]
        changes["training"] = config.training.model_copy(update={"inputs": placed})
    critic = config.critic
    if critic is not None and critic.start:  # else it stays a key that the user has not set
        changes["critic"] = critic.model_copy(update={"start": place(critic.start)})
    return config.model_copy(update=changes)


def name_and_revision(reference: str | Path) -> tuple[str, str | None]:
    """What hf:ORG/NAME[@REVISION] names."""
    name, _, revision = str(reference).removeprefix("hf:").partition("@")
    return name, revision or None


def cached(reference: str) -> str:
    """The directory of hf:ORG/NAME[@REVISION] where it is in the local cache; else, and for others, what it was.

    Raises:
        UserError: nothing on the Hub can have that name.
    """
    if not reference.startswith("hf:"):
        return reference
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    name, revision = name_and_revision(reference)
    try:
        directory = snapshot_download(name, revision=revision, allow_patterns=MODEL_PATTERNS, local_files_only=True)
    except LocalEntryNotFoundError:
        return reference
    except HFValidationError as error:
        raise UserError(f"{reference} is no name of a model on the Hub: {error}") from error
    return directory if list(Path(directory).glob("*.safetensors")) else reference


def fetch(reference: str) -> str:
    """Download hf:ORG/NAME[@REVISION] and return its directory; anything else is returned as it is.

    Raises:
        UserError: the Hub does not have it, or cannot be reached and it is not in the cache.
    """
    if not reference.startswith("hf:"):
        return reference
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    name, revision = name_and_revision(reference)
    try:
        return snapshot_download(name, revision=revision, allow_patterns=MODEL_PATTERNS)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"model {reference} could not be downloaded: {str(error).splitlines()[0]} "
            "Check the name, the network, and HF_TOKEN for gated models; or give a local directory."
        ) from error
