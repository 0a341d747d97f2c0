"""The scorer kind `language`: the probability that an answer is in a given language."""

from typing import Any, ClassVar, Literal

from annotation.scorers.base import ScoreConfig, WorkerSettings
from contracts.config import described_pattern, identity

CODE = described_pattern("^[a-z]{2,3}$", "an ISO 639 code in small letters, for example en")


class LanguageSettings(WorkerSettings):
    """Settings of a language check."""

    kind: Literal["language"] = identity()
    """The probability that a response is in a language, by py3langid; short texts are hard to classify. A response
    without a letter (numbers, brackets) is in none: it is dropped and counted as `unscored`."""
    language: str = identity(pattern=CODE)
    """The language: de, en, ja, zh, ..."""
    among: list[str] | None = identity(None, min_length=2)
    """The candidate languages, which makes it more accurate; by default all that py3langid knows."""

    calls: ClassVar[str] = "annotation.scorers.language:LanguageVerifier"
    further_libraries: ClassVar[tuple[str, ...]] = ("py3langid",)

    def check(self) -> None:
        """Check that py3langid knows the languages."""
        super().check()
        LanguageVerifier(language=self.language, among=self.among)


class LanguageConfig(LanguageSettings, ScoreConfig):
    """Score every completion by its language."""


class LanguageVerifier:
    """Identifies the language of answers."""

    def __init__(self, *, language: str, among: list[str] | None) -> None:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier

        from contracts.errors import UserError

        self.language = language
        self.identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
        known = self.identifier.labels
        if unknown := [one for one in (language, *(among or ())) if one not in known]:
            raise UserError(f"py3langid knows no language {unknown[0]!r}. Known: {', '.join(sorted(known))}.")
        if among is not None:
            self.identifier.set_languages(sorted({language, *among}))

    def __call__(self, *, response: str, **others: Any) -> dict[str, Any] | None:
        """The probability of the language, and the most probable one; None for an answer without letters."""
        if not any(letter.isalpha() for letter in response):
            return None
        ranked = dict(self.identifier.rank(response))
        return {"score": min(1.0, float(ranked[self.language])), "seen": max(ranked, key=lambda one: ranked[one])}
