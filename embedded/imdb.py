"""Prompts and reward of the recipe imdb-sentiment-ppo.

    pipeline env run annotation -m embedded.imdb data/imdb

writes train.jsonl and heldout.jsonl, one {"prompt": the opening of a review} a line.
"""

import functools
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

WORDS = 64
"""Of a review, as its opening: about 100 tokens, where ReaL's tutorial allows 128."""
CLASSIFIER = "lvwerra/distilbert-imdb"
SCALE, MOST = 10.0, 20.0
"""ReaL's reward_output_scaling and max_reward_clip."""


def opening(review: str) -> str:
    """The first words of a review, without HTML; empty where it is not longer than them."""
    words = review.replace("<br />", " ").split()
    return " ".join(words[:WORDS]) if len(words) > WORDS else ""


def write_prompts(reviews: Iterable[str], path: Path, limit: int) -> None:
    """Write the openings of the first `limit` reviews that are long enough."""
    openings = list(dict.fromkeys(filter(None, map(opening, reviews))))[:limit]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in openings))


@functools.cache
def _classifier() -> Any:
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForSequenceClassification.from_pretrained(CLASSIFIER).eval().to(device)
    return AutoTokenizer.from_pretrained(CLASSIFIER), model


def reward_of(logit: float) -> float:
    """The reward for the logit of the class `positive`."""
    return max(-MOST, min(MOST, SCALE * logit))


def positive(*, messages: list[dict[str, str]], response: str, finish_reason: str, answer: Any) -> float:
    """How positive a classifier finds the review, its opening included."""
    import torch

    tokenizer, model = _classifier()
    inputs = tokenizer(f"{messages[-1]['content']} {response}", truncation=True, return_tensors="pt").to(model.device)
    with torch.no_grad():
        return reward_of(float(model(**inputs).logits[0, -1]))


if __name__ == "__main__":
    from datasets import load_dataset

    target = Path(sys.argv[1])
    for split, name, most in (("train", "train", 5120), ("test", "heldout", 500)):
        shuffled = load_dataset("stanfordnlp/imdb", split=split).shuffle(seed=1)
        write_prompts(shuffled["text"], target / f"{name}.jsonl", most)
