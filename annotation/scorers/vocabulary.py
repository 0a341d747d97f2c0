"""Checks that a model which reads stored token ids has the vocabulary of the policy that sampled them. Needs no
torch."""

from pathlib import Path

from contracts.artifacts import Artifact
from contracts.errors import UserError
from contracts.models import ModelInfo


def shared_vocabulary(model: Path, rollouts: Artifact, *, required: bool) -> dict[str, str]:
    """The fact `vocabulary` if the model has the vocabulary of the policy that sampled; empty if that is not known.

    Args:
        required: raise an error if that is not known.

    Raises:
        UserError: the vocabularies differ, or whether they do is unknown although `required`.
    """
    policy = rollouts.manifest.facts.get("vocabulary")
    known = policy is not None and ModelInfo.read(model).has_tokenizer
    if not known and not required:
        return {}
    if policy is None:
        raise UserError(
            f"{rollouts.path} does not record the vocabulary of its token ids (its manifest has no fact `vocabulary`), "
            "so it cannot be checked that the critic has the same. Generate the rollouts again."
        )
    if not known:
        raise UserError(
            f"critic {model} has no tokenizer, so it cannot be checked that its vocabulary is that of the rollouts. "
            "Save the tokenizer of the model that it was made from into its directory, with save_pretrained."
        )
    from contracts.chat import ChatTokenizer

    found = ChatTokenizer(model).vocabulary
    if found != policy:
        raise UserError(
            f"{model} has another vocabulary ({found[:12]}) than the policy that sampled {rollouts.path} "
            f"({policy[:12]}): the same token ids are other text to it. Use a model with the policy's vocabulary."
        )
    return {"vocabulary": found}
