"""Divergences of whole distributions, in chunks, against softmaxes written out."""

import pytest
import torch
from torch import nn

import modeling.divergence
from modeling.divergence import divergences
from modeling.logprobs import LogprobHead


@pytest.mark.parametrize("chunk", [512, 3])
def test_values_and_gradients_are_those_of_softmaxes(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modeling.divergence, "CHUNK", chunk)
    torch.manual_seed(0)
    policy, reference = nn.Linear(6, 11).double(), nn.Linear(4, 11, bias=False).double()
    states, others, ids = torch.randn(8, 6).double().requires_grad_(), torch.randn(8, 4).double(), torch.arange(8)
    weights = torch.randn(2, 8).double()
    gradients = []
    for ours in (True, False):
        policy.zero_grad()
        states.grad = None
        if ours:
            heads = LogprobHead(policy), LogprobHead(reference)
            found = divergences(heads[0], states, heads[1], others, ids)
            pair = found["kl_to_reference"], found["kl_from_reference"]
        else:
            p, q = policy(states).softmax(-1), reference(others).softmax(-1).detach()
            pair = (p * (p / q).log()).sum(-1), (q * (q / p).log()).sum(-1)
            torch.testing.assert_close(found["reference"], q.log()[torch.arange(8), ids].float())
            for mine, expected in zip((found["kl_to_reference"], found["kl_from_reference"]), pair, strict=True):
                torch.testing.assert_close(mine.double(), expected, atol=1e-6, rtol=1e-5)
        (weights[0] * pair[0] + weights[1] * pair[1]).sum().backward()
        gradients.append([states.grad, *(parameter.grad.clone() for parameter in policy.parameters())])
    for mine, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, expected, atol=1e-6, rtol=1e-4)
    assert reference.weight.grad is None
