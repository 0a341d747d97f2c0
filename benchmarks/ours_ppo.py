"""Ratchet's side of the PPO benchmark: trains on given rollouts, one batch of rollouts per unit of work.

It measures what Ratchet's stages compute after sampling and rewards: the reference's log-probabilities, the critic's
values, the experience, the policy's own log-probabilities before its training, and the epochs of both trainings. (TRL
needs no pass for the policy's log-probabilities, since it keeps the logits from sampling.)
"""

import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from benchmarks import workload
from benchmarks.side import Side


def main(path: str) -> None:
    """Train until no more units are requested; `path` is a file written by `workload.write`."""
    side = Side()
    import numpy as np
    import torch

    from annotation.models.logprobs import LogprobModel
    from annotation.models.values import ValueModel
    from benchmarks.core import Core, critic_config, policy_config, watch
    from modeling.modules import TokenLogprobs, TokenValues
    from modeling.rows import Response, Row, token_ids
    from training.algorithm import Experience
    from training.algorithms import ppo
    from training.critic import critic_loss
    from training.drift import measure_drift
    from training.loop import Learning
    from training.policy import learning
    from training.registry import describe

    settings, shape, batches = workload.read(Path(path), workload.Rollout)
    torch.set_num_threads(settings["threads"])
    settings["rows"] = len(batches[0])
    of_policy, of_critic = policy_config(settings, "ppo", {}), critic_config(settings)
    policy_model, critic_model = shape.causal(settings["seed"]), shape.classifier(settings["seed"] + 1)
    of_ppo = learning(of_policy, describe("ppo"), [])
    value_loss = critic_loss(of_critic)
    with tempfile.TemporaryDirectory() as scratch:
        reference = LogprobModel(*_saved(policy_model, Path(scratch, "policy"), "logprobs", settings))
        values = ValueModel(*_saved(critic_model, Path(scratch, "critic"), "values", settings))
    policy = Core(of_policy, policy_model, lambda model: TokenLogprobs(model, entropy=True))
    critic = Core(of_critic, critic_model, TokenValues)
    logprobs_of, values_of = side.timed("reference", reference), side.timed("values", values)
    proximal_of = side.timed("proximal", measure_drift)
    train_policy = side.timed("policy", policy.train)
    train_critic = side.timed("critic", critic.train)
    watch(side)
    budget = of_policy.micro_batch_tokens
    side.ready(packing=policy.packing, attention=policy.attention, micro_batch_tokens=budget)
    for batch in batches:
        responses = [Response(token_ids(row.response), {"reward": 0.0, "truncated": 0.0}) for row in batch]
        rows = [
            Row(str(number), token_ids(row.prompt), (response,))
            for number, (row, response) in enumerate(zip(batch, responses, strict=True))
        ]
        for response in responses:
            response.tokens["behaviour"] = np.zeros(len(response.ids), np.float32)
        # Stands for the log-probabilities that the engine reported when it sampled.
        side.exclude(measure_drift)(rows, policy.engine, policy.packing, budget)
        for response in responses:
            response.tokens["behaviour"] = response.tokens["proximal"]

        samples = [_sample(row) for row in batch]
        proximal_of(rows, policy.engine, policy.packing, budget)
        experience = Experience(
            rewards=torch.randn(len(batch), dtype=torch.float64, generator=torch.Generator().manual_seed(0)),
            prompts=torch.arange(len(batch)),
            lengths=torch.tensor([len(response.ids) for response in responses]),
            behaviour=_flat(response.tokens["behaviour"] for response in responses),
            kl_coefficient=0.05,
            reference=_flat(logprobs_of(samples)),
            values=_flat(values_of(samples)),
        )
        found = ppo.advantages(experience)
        columns = {"advantages": found.advantages, "returns": found.returns}
        columns |= {"reference": experience.reference, "values": experience.values}
        for name, column in columns.items():
            assert column is not None
            parts = column.float().split(experience.lengths.tolist())
            for response, part in zip(responses, parts, strict=True):
                response.tokens[name] = part.numpy()
        first, *_ = train_policy(replace(of_ppo, rows=rows))
        first_of_critic, *_ = train_critic(Learning(rows, value_loss))
        side.done(
            useful_tokens=sum(row.useful_tokens for row in batch),
            policy_loss=first["policy_loss"],
            value_loss=first_of_critic["loss"],
            entropy=-float(experience.behaviour.sum()) / len(batch),
        )


def _saved(model: Any, path: Path, kind: str, settings: dict[str, Any]) -> tuple[Any, None]:
    """Save a model, and return the config of a scorer that loads it.

    The scorer keeps the initial critic, whereas a run would load the newest one; the amount of work is the same.
    """
    from annotation.scorers import score_config

    model.save_pretrained(path)
    tokens = settings["micro_batch_tokens"]
    return score_config(output=path, rollouts=path, kind=kind, model=path, batch_tokens=tokens), None  # type: ignore[arg-type]


def _sample(row: workload.Rollout) -> Any:
    """A sample as a scorer reads it; `scored` returns the values of its tokens."""
    return SimpleNamespace(
        rollout=SimpleNamespace(prompt_ids=row.prompt),
        completion=SimpleNamespace(response_ids=row.response),
        scored=lambda _, **tokens: next(iter(tokens.values())),
    )


def _flat(columns: Any) -> Any:
    """Concatenate the per-token values of all responses, in fp64."""
    import torch

    return torch.cat([torch.as_tensor(column, dtype=torch.float64) for column in columns])


if __name__ == "__main__":
    main(sys.argv[1])
