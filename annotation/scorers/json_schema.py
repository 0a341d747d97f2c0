"""The scorer kind `json_schema`: whether an answer is JSON that fits a schema."""

import re
from typing import Any, ClassVar, Literal

import msgspec

from annotation.scorers.base import ScoreConfig, WorkerSettings
from contracts.config import identity

FENCE = re.compile(r"```(?:json)?[ \t]*\n(.*?)```", re.DOTALL)


class JsonSchemaSettings(WorkerSettings):
    """Settings of a JSON check."""

    kind: Literal["json_schema"] = identity()
    """Whether a response is JSON that fits a JSON Schema."""
    definition: dict[str, Any] | None = identity(None)
    """The JSON Schema (draft 2020-12 unless its $schema names another). By default that in the prompt's `answer`, as
    text. References outside of it are refused."""
    fenced: bool = identity(True)
    """Use the first block between ```, if there is one."""

    calls: ClassVar[str] = "annotation.scorers.json_schema:JsonVerifier"
    further_libraries: ClassVar[tuple[str, ...]] = ("jsonschema",)

    def check(self) -> None:
        """Check that the definition is a JSON Schema."""
        super().check()
        JsonVerifier(definition=self.definition, fenced=self.fenced)

    @property
    def reads_answer(self) -> bool:
        """Whether it requires the prompt's known `answer`: if there is no common definition."""
        return self.definition is None


class JsonSchemaConfig(JsonSchemaSettings, ScoreConfig):
    """Score every completion by a JSON Schema."""


class JsonVerifier:
    """Validates answers."""

    def __init__(self, *, definition: dict[str, Any] | None, fenced: bool) -> None:
        self.fenced = fenced
        self.validators: dict[str, Any] = {}
        self.validator = None if definition is None else _validator(definition)

    def __call__(self, *, response: str, answer: str | None, **others: Any) -> dict[str, Any] | None:
        """1 or 0, the part `parses`, and the first validation error; None if there is no schema."""
        validator = self.validator
        if validator is None:
            if answer is None:
                return None
            if answer not in self.validators:
                self.validators[answer] = _validator(msgspec.json.decode(answer))
            validator = self.validators[answer]
        block = FENCE.search(response) if self.fenced else None
        try:
            found = msgspec.json.decode(block[1] if block else response)
        except (msgspec.DecodeError, RecursionError) as error:
            return {"score": 0.0, "parses": 0.0, "wrong": str(error)[:500]}
        wrong = next(iter(validator.iter_errors(found)), None)
        shown = None if wrong is None else f"{wrong.json_path}: {wrong.message}"[:500]
        return {"score": float(wrong is None), "parses": 1.0, "wrong": shown}


def _validator(definition: Any) -> Any:
    """A validator for the schema; references to other documents are refused.

    Raises:
        UserError: the definition is not a JSON Schema.
    """
    import jsonschema
    import referencing

    from contracts.errors import UserError

    try:
        chosen = jsonschema.validators.validator_for(definition, default=jsonschema.Draft202012Validator)
        chosen.check_schema(definition)
    except jsonschema.SchemaError as error:
        raise UserError(f"definition is not a JSON Schema: {error.json_path}: {error.message}.") from error
    return chosen(definition, registry=referencing.Registry())
