"""A service that gives rewards: what it is sent, what it may reply, and what is made of a reply that is wrong."""

import json
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from annotation_world import ROOT, make_rollout, make_rollouts, publish_rollouts
from remote_world import Handler, Server, cut_off, drip, html, serving

from annotation.preflight import check_scorer
from annotation.remote import client as client_module
from annotation.scorers import score_config
from annotation.stages.score import SCORE
from contracts.artifacts import Artifact
from contracts.errors import TransientError, UserError
from contracts.preflight import Inspected, findings_of
from contracts.records import Rollout, Score
from contracts.stage import run_stage


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "FIRST_PAUSE", 0.01)


@pytest.fixture
def answers(tmp_path: Path) -> Artifact:
    """Two shards: four prompts with two answers each."""
    texts = [["good .", "great ."], ["awful .", "bad ."], ["blue .", "long ."], ["book .", "meal ."]]
    rollouts = [make_rollout(number, pair) for number, pair in enumerate(texts)]
    return publish_rollouts(tmp_path / "rollouts", rollouts, shard=2)


def score(tmp_path: Path, rollouts: Artifact, server: Server, output: str = "scores", **keys: Any) -> Artifact:
    fields = {"kind": "http", "url": f"{server.url}/score", "service": "lengths-1", "batch_size": 4, **keys}
    found = run_stage(SCORE, score_config(output=tmp_path / output, rollouts=rollouts.path, **fields))
    assert found is not None
    return found


def values(scores: Artifact) -> list[float]:
    return [row.score for row in scores.rows(Score)]


def lengths(handler: Handler, body: dict[str, Any]) -> None:
    handler.reply({"scores": [len(sample["response"]) for sample in body["samples"]]})


def test_a_service_is_sent_batches_and_its_replies_are_scores(tmp_path: Path, answers: Artifact) -> None:
    with serving(lengths) as server:
        found = score(tmp_path, answers, server)
    assert values(found) == [6, 7, 7, 5, 6, 6, 6, 6]
    assert [len(body["samples"]) for body in server.asked] == [4, 4]
    rollout = next(answers.rows(Rollout))
    (sent,) = [one for body in server.asked for one in body["samples"] if one["response"] == "great ."]
    assert sent == {
        "messages": [{"role": "user", "content": "review the film "}], "response": "great .", "finish_reason": "stop",
        "answer": "great", "tags": [], "tools": None, "response_ids": list(rollout.completions[1].response_ids),
        "prompt_id": rollout.prompt_id, "sample": 1,
    }  # fmt: skip
    assert found.manifest.facts["repeatable"] == "as far as the service is"


def test_a_reply_may_hold_token_rewards_parts_extras_and_null(tmp_path: Path, answers: Artifact) -> None:
    def richly(handler: Handler, body: dict[str, Any]) -> None:
        made: list[Any] = []
        for sample in body["samples"]:
            tokens = [0.5] * len(sample["response_ids"])
            rich = {"score": 2, "format": 1, "why": "so"}
            made.append({"good .": None, "great .": tokens, "awful .": rich}.get(sample["response"], 1.5))
        handler.reply({"scores": made})

    with serving(richly) as server:
        found = score(tmp_path, answers, server, max_dropped=0.2)
    assert found.manifest.ledger.dropped == {"unscored": 1}
    great, awful, *_ = found.rows(Score)
    assert (great.score, great.token_rewards) == (1.5, (0.5, 0.5, 0.5))
    assert (awful.score, awful.parts, awful.extras) == (2, {"format": 1}, {"why": "so"})


WRONG: dict[str, tuple[Callable[[Handler, dict[str, Any]], None], str]] = {
    "too few": (lambda h, b: h.reply({"scores": [1.0] * (len(b["samples"]) + 1)}), "was sent 1 answers, .* 2 scores"),
    "no list": (lambda h, b: h.reply({"scores": {"a": 1}} | {}), "returned a mapping without 'score'"),
    "no scores": (lambda h, b: h.reply({"reward": [1.0]}), "not an object with the list `scores`"),
    "text": (lambda h, b: h.reply({"scores": ["good"] * len(b["samples"])}), "returned 'good'"),
    "a page": (lambda h, b: html(h), "text/html that is not JSON"),
    "cut off": (lambda h, b: cut_off(h), "closed the connection"),
    "drip": (lambda h, b: drip(h), "has not replied in timeout=0.5 s"),
    "500": (lambda h, b: h.reply({"detail": "CUDA out of memory"}, 500), "replied 500: .*out of memory"),
    "413": (lambda h, b: h.reply(b"too large", 413), "replied 413"),
    "nan": (lambda h, b: h.reply({"scores": [float("nan")] * len(b["samples"])}), "gave nan for"),
    "tokens": (lambda h, b: h.reply({"scores": [[1.0]] * len(b["samples"])}), "returned 1 numbers for"),
}


@pytest.mark.parametrize("fault", WRONG)
def test_what_is_wrong_fails_who_is_to_blame_and_is_never_a_score(
    tmp_path: Path, answers: Artifact, fault: str
) -> None:
    """Where one answer of a batch of two makes the service fail, the other is judged."""
    behave, message = WRONG[fault]

    def sometimes(handler: Handler, body: dict[str, Any]) -> None:
        if any(sample["response"] == "bad ." for sample in body["samples"]):
            behave(handler, body)
        else:
            lengths(handler, body)

    alone = fault in ("drip", "cut off")  # nobody replied: a smaller batch would not help
    with serving(sometimes) as server:
        keys = {"batch_size": 1 if alone else 2, "retries": 1, "timeout": 0.5}
        found = score(tmp_path, answers, server, fail_on_error=0.3, **keys)
        by_all = fault in ("nan", "text", "tokens")  # these results stand each for one answer
        assert found.manifest.ledger.dropped == {"failed": 2 if by_all else 1}
        assert set(values(found)) <= {5.0, 6.0, 7.0}
        assert any(re.search(message, text) for text in found.manifest.facts["failures"])
        with pytest.raises((UserError, TransientError), match=message):
            score(tmp_path, answers, server, "strict", service="lengths-2", **keys)


def test_a_redirect_is_told_and_not_followed(tmp_path: Path, answers: Artifact) -> None:
    with serving(lengths) as elsewhere:
        with (
            serving(lambda handler, body: handler.reply({}, 302, Location=elsewhere.url)) as server,
            pytest.raises(UserError, match=f"a redirect to {elsewhere.url}, which is not followed"),
        ):
            score(tmp_path, answers, server, fail_on_error=0.9)
        assert elsewhere.asked == []


def test_a_service_that_differs_is_found_when_asked_twice(tmp_path: Path, answers: Artifact) -> None:
    def drawn(handler: Handler, body: dict[str, Any]) -> None:
        handler.reply({"scores": [len(handler.server.asked)] * len(body["samples"])})

    with serving(drawn) as server:
        with pytest.raises(UserError, match=r"scored prompt .*, sample 0 twice with different results: 1.0, then 2.0"):
            score(tmp_path, answers, server, judge_twice=1)
        score(tmp_path, answers, server, "once")
    with serving(lengths) as server:
        score(tmp_path, answers, server, "same", service="other", judge_twice=3)
        assert len(server.asked) == 4


def test_equal_services_share_the_work(tmp_path: Path, answers: Artifact) -> None:
    with serving(lengths) as one, serving(lengths) as other:
        found = score(tmp_path, answers, one, url=[one.url, other.url], batch_size=1)
        assert len(one.asked) == len(other.asked) == 4
    assert values(found) == [6, 7, 7, 5, 6, 6, 6, 6]


def test_the_protocol_of_openrlhf(tmp_path: Path, answers: Artifact, tokenizer: Any) -> None:
    def serve_rm(handler: Handler, body: dict[str, Any]) -> None:
        assert body.keys() == {"query", "prompts", "labels"}
        rewards = [
            float(len(query) - len(prompt)) for query, prompt in zip(body["query"], body["prompts"], strict=True)
        ]
        handler.reply({"rewards": [[value] for value in rewards], "scores": rewards, "extra_logs": {"dummy": rewards}})

    tokenizer.save_pretrained(tmp_path / "tokenizer")
    with serving(serve_rm) as server:
        found = score(tmp_path, answers, server, protocol="openrlhf", tokenizer=tmp_path / "tokenizer")
    (sent,) = [body for body in server.asked if body["query"][0].endswith("good . </s>")]
    assert sent["prompts"][0] == "<s> <|user|> review the film <|assistant|>"
    assert sent["query"][0] == "<s> <|user|> review the film <|assistant|> good . </s>"
    assert sent["labels"][0] == "great"
    first = next(found.rows(Score))
    assert (first.score, first.parts) == (12, {"dummy": 12})
    with pytest.raises(UserError, match=r"protocol=openrlhf .*, and no tokenizer is set. Set tokenizer=DIRECTORY"):
        score(tmp_path, answers, server, protocol="openrlhf")
    with pytest.raises(UserError, match=r"tokenizer=.* is for protocol=openrlhf alone, and protocol is ratchet"):
        score(tmp_path, answers, server, tokenizer=tmp_path / "tokenizer")


@pytest.mark.slow
def test_what_was_judged_survives_a_kill(tmp_path: Path) -> None:
    rollouts = publish_rollouts(tmp_path / "rollouts", make_rollouts(6, 4), shard=99)

    replies = threading.Semaphore(1000)

    def rarely(handler: Handler, body: dict[str, Any]) -> None:
        replies.acquire()
        lengths(handler, body)

    with serving(rarely) as server:
        whole = score(tmp_path, rollouts, server, "whole")
        server.asked.clear()
        argv = [sys.executable, "-m", "annotation", "score", "kind=http", f"url={server.url}", "service=lengths-1"]
        argv += ["batch_size=1", "concurrency=2", f"rollouts={rollouts.path}", f"output={tmp_path / 'scores'}"]
        replies = threading.Semaphore(8)
        stage = subprocess.Popen(argv, cwd=ROOT)
        while len(server.asked) < 10:
            assert stage.poll() is None
            time.sleep(0.01)
        stage.kill()
        stage.wait()
        replies.release(1000)
        assert subprocess.run(argv, cwd=ROOT, check=False).returncode == 0
    asked = Counter(json.dumps(body, sort_keys=True) for body in server.asked)
    assert len(asked) == 24
    assert sum(asked.values()) == 24 + 2
    assert Artifact.open(tmp_path / "scores").manifest.digest == whole.manifest.digest


def test_preflight_says_whether_somebody_listens() -> None:
    def findings(url: str) -> list[tuple[str, str]]:
        fields = {"kind": "http", "service": "s", "output": "preflight", "rollouts": "made-by/generation", "url": url}
        stage = Inspected("reward", score_config(**fields), frozenset(["rollouts"]), ())
        return [(finding.level, finding.found) for finding in findings_of(lambda: check_scorer(stage))]

    with serving(lengths) as server:
        assert findings(server.url) == [("ok", f"a server listens at {server.url}")]
        assert server.asked == []
    ((level, found),) = findings(server.url)
    assert (level, "no server listens" in found) == ("warning", True)
