"""What a comparison of runs says."""

import msgspec


class Series(msgspec.Struct, frozen=True):
    """One metric of one run, by iteration."""

    run: str
    values: list[tuple[int, float]]


class Change(msgspec.Struct, frozen=True):
    """A key whose value is not the same in all runs."""

    key: str
    values: list[str]
    """One for each run, in order."""


class ComparedAnswers(msgspec.Struct, frozen=True):
    """The answers of both policies to one prompt, with their mean scores."""

    prompt_id: str
    prompt: str
    first: str
    second: str
    first_score: float
    second_score: float


class Paired(msgspec.Struct, frozen=True):
    """Two policies by one scorer, on the held-out prompts that both have answered."""

    scorer: str
    first: str
    """Run and iteration of the policy that is compared with."""
    second: str
    prompts: int
    difference: float
    """Mean over the prompts of what the second has more: each prompt counts by the mean score of its answers."""
    ci95: float
    """Half the width of its 95 % confidence interval, prompts being drawn independently."""
    wins: float
    """Share of prompts in which the second has more, a tie being half."""
    answers: list[ComparedAnswers]
    """Of the prompts with the largest differences."""

    @property
    def is_clear(self) -> bool:
        """Whether the difference is larger than its interval."""
        return abs(self.difference) > self.ci95

    @property
    def sentence(self) -> str:
        """The result in words."""
        by = f"by {self.scorer}, on {self.prompts} prompts"
        interval = f"{abs(self.difference):.3g} ± {self.ci95:.2g}"
        if not self.is_clear:
            return (
                f"Between {self.second} and {self.first} no difference can be told {by}: "
                f"{self.difference:+.3g} ± {self.ci95:.2g}"
            )
        return f"{self.second} is {'better' if self.difference > 0 else 'worse'} than {self.first} by {interval}, {by}"


class Comparison(msgspec.Struct, frozen=True):
    """Several runs, each compared with the first."""

    runs: list[str]
    changes: list[Change]
    metrics: dict[str, list[Series]]
    """By name, of every evaluation metric that two runs or more have."""
    paired: list[Paired]
    notes: list[str]
    """Why something could not be compared."""
    left_out: list[str] = []
    """Runs that are damaged; the notes say how."""
