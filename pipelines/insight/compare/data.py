"""The data of a comparison of runs."""

import msgspec


class Series(msgspec.Struct, frozen=True):
    """One metric of one run, by iteration."""

    run: str
    values: list[tuple[int, float]]


class Change(msgspec.Struct, frozen=True):
    """A config key whose value is not the same in all runs."""

    key: str
    values: list[str]
    """One value for each run, in order."""


class ComparedAnswers(msgspec.Struct, frozen=True):
    """The answers of both policies to one prompt, with their mean scores."""

    prompt_id: str
    prompt: str
    first: str
    second: str
    first_score: float
    second_score: float


class PairedComparison(msgspec.Struct, frozen=True):
    """Comparison of two policies by one scorer, on the held-out prompts that both have answered."""

    scorer: str
    first: str
    """Run and iteration of the baseline policy."""
    second: str
    prompts: int
    difference: float
    """Mean over the prompts of the second policy's score minus the first's, each the mean over the prompt's answers."""
    ci95: float
    """Half the width of the 95 % confidence interval of `difference`, with prompts as independent draws."""
    wins: float
    """Share of prompts on which the second policy scores higher; ties count as half."""
    answers: list[ComparedAnswers]
    """Answers to the prompts with the largest differences."""

    @property
    def is_clear(self) -> bool:
        """Whether the difference is larger than `ci95`."""
        return abs(self.difference) > self.ci95

    @property
    def sentence(self) -> str:
        """The result in words."""
        by = f"by {self.scorer}, on {self.prompts} prompts"
        interval = f"{abs(self.difference):.3g} ± {self.ci95:.2g}"
        if not self.is_clear:
            return (
                f"No significant difference between {self.second} and {self.first} {by}: "
                f"{self.difference:+.3g} ± {self.ci95:.2g}"
            )
        return f"{self.second} is {'better' if self.difference > 0 else 'worse'} than {self.first} by {interval}, {by}"


class Comparison(msgspec.Struct, frozen=True):
    """Several runs, each compared with the first."""

    runs: list[str]
    changes: list[Change]
    metrics: dict[str, list[Series]]
    """The evaluation metrics by name, one series for each run."""
    paired: list[PairedComparison]
    notes: list[str]
    """The reasons why something could not be compared."""
    left_out: list[str] = []
    """Runs that are damaged; `notes` has the reasons."""
