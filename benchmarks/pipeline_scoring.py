"""The other side of benchmarks/annotation.py: runs transformers' text-classification pipeline as RLHFlow does.

With a batch size above 1 the texts are sorted by length, which minimizes padding.
"""

import json
import sys
from pathlib import Path

from benchmarks.answers import read_cases
from benchmarks.side import Side, cpu_seconds
from benchmarks.workload import Shape


def main(path: str) -> None:
    """Score the cases in turn until no more units are requested."""
    side = Side()
    import torch
    from transformers import AutoTokenizer, pipeline

    settings = json.loads(Path(path).read_text())
    folder, size = Path(settings["folder"]), settings["batch_size"]
    shape = Shape(**json.loads((folder / "model" / "shape.json").read_text()))
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    scorer = pipeline(
        "text-classification", model=str(folder / "model"), tokenizer=tokenizer, device="cpu", dtype=torch.float32
    )
    cases = read_cases(folder)
    side.ready(start_cpu_seconds=cpu_seconds())
    while True:
        for case in cases.values():
            texts = [
                tokenizer.apply_chat_template(
                    [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}], tokenize=False
                )
                for prompt, answers in case.conversations(shape)
                for answer in answers
            ]
            order = sorted(range(len(texts)), key=lambda index: -texts[index].count(" ")) if size > 1 else None
            given = texts if order is None else [texts[index] for index in order]
            found = [output["score"] for output in scorer(given, function_to_apply="none", batch_size=size)]
            places = range(len(texts)) if order is None else order
            scores = [score for _, score in sorted(zip(places, found, strict=True))]
            side.done(scores=scores, tokens=0)


if __name__ == "__main__":
    main(sys.argv[1])
