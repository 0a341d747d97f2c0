"""Models named by a Hub id: downloaded once, then a directory like any other."""

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from contracts.errors import UserError
from pipelines.config import RunConfig

MODEL_PATTERNS = ["*.json", "*.safetensors", "*.jinja", "*.model", "merges.txt", "vocab.txt"]


def fetch_models(config: RunConfig) -> RunConfig:
    """The same configuration with every hf: model replaced by its local directory."""
    policy = fetch(config.policy)
    scorers = {
        name: scorer.model_copy(update={"model": Path(fetch(str(scorer.model)))}) if scorer.model else scorer
        for name, scorer in config.scorers.items()
    }
    critic = config.critic
    if critic is not None and critic.start:
        critic = critic.model_copy(update={"start": fetch(critic.start)})
    return config.model_copy(update={"policy": policy, "scorers": scorers, "critic": critic})


def fetch(reference: str) -> str:
    """Download hf:ORG/NAME[@REVISION] and return its directory; anything else is returned as it is.

    Raises:
        UserError: the Hub does not have it, or cannot be reached and it is not in the cache.
    """
    if not reference.startswith("hf:"):
        return reference
    name, _, revision = reference.removeprefix("hf:").partition("@")
    try:
        return snapshot_download(name, revision=revision or None, allow_patterns=MODEL_PATTERNS)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"model {reference} could not be downloaded: {str(error).splitlines()[0]} "
            "Check the name, the network, and HF_TOKEN for gated models; or give a local directory."
        ) from error
