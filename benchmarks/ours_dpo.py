"""Ratchet's side of the DPO benchmark: trains on given pairs, one optimizer step per unit of work."""

import sys
from dataclasses import replace
from pathlib import Path

from benchmarks import workload
from benchmarks.side import Side


def main(path: str) -> None:
    """Train until no more units are requested; `path` is a file written by `workload.write`."""
    side = Side()
    import torch

    from benchmarks.core import Core, policy_config, watch
    from modeling.modules import TokenLogprobs
    from modeling.rows import Response, Row, token_ids
    from training.policy import learning
    from training.registry import describe

    settings, shape, batches = workload.read(Path(path), workload.Pair)
    torch.set_num_threads(settings["threads"])

    def row(number: int, pair: workload.Pair) -> Row:
        answers = zip((pair.chosen, pair.rejected), pair.reference, strict=True)
        responses = tuple(
            Response(token_ids(ids), {"score": 0.0, "reference": value, "truncated": 0.0}) for ids, value in answers
        )
        return Row(str(number), token_ids(pair.prompt), responses)

    made = [[row(number, pair) for number, pair in enumerate(batch)] for batch in batches]
    settings["rows"] = len(batches[0])
    config = policy_config(settings, "dpo", {"beta": settings["beta"]})
    core = Core(config, shape.causal(settings["seed"]), TokenLogprobs)
    dpo = learning(config, describe("dpo"), [])
    watch(side)
    side.ready(packing=core.packing, attention=core.attention, micro_batch_tokens=config.micro_batch_tokens)
    for batch, rows in zip(batches, made, strict=True):
        (line,) = core.train(replace(dpo, rows=rows))
        side.done(useful_tokens=sum(pair.useful_tokens for pair in batch), loss=line["loss"])


if __name__ == "__main__":
    main(sys.argv[1])
