"""Judges behind an endpoint: what they are asked, how their answers are read, what they cost, and what goes wrong."""

import json
import math
import re
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from annotation_world import make_rollout, make_rollouts, publish_rollouts, run_cli
from remote_world import Handler, Server, cut_off, drip, html, serving
from warm_stages import WarmStage, start_stage

from annotation.preflight import check_scorer
from annotation.remote import client as client_module
from annotation.remote.parsing import RATING, VERDICT, ReplyParser
from annotation.remote.replies import Reply, Token
from annotation.scorers import score_config
from annotation.stages.score import SCORE
from contracts.artifacts import Artifact
from contracts.errors import TransientError, UserError
from contracts.preflight import Inspected, findings_of
from contracts.records import Score
from contracts.stage import run_stage


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(client_module, "FIRST_PAUSE", 0.01)
    monkeypatch.setenv("RATCHET_HOME", str(tmp_path / "home"))


@pytest.fixture
def answers(tmp_path: Path) -> Artifact:
    """Two shards of prompts with two answers each."""
    texts = [["good .", "great ."], ["awful .", "bad ."], ["blue .", "long ."]]
    return publish_rollouts(
        tmp_path / "rollouts", [make_rollout(number, pair) for number, pair in enumerate(texts)], shard=2
    )


def answer_in(body: dict[str, Any]) -> str:
    """The answer that a built-in question is about."""
    found = re.search(r"\[Answer to judge\]\n(.*)\n\[End", body["messages"][-1]["content"])
    assert found is not None
    return found[1]


def rate(handler: Handler, body: dict[str, Any]) -> None:
    """Rates by length."""
    handler.say(f"Well. Rating: 9\nNo, I was wrong.\n**Rating:** {len(answer_in(body))}/10")


def score(tmp_path: Path, rollouts: Artifact, server: Server, output: str = "scores", **keys: Any) -> Artifact:
    fields = {"kind": "judge", "url": f"{server.url}/v1", "model": "judge", **keys}
    config = score_config(output=tmp_path / output, rollouts=rollouts.path, **fields)
    found = run_stage(SCORE, config)
    assert found is not None
    return found


def command(tmp_path: Path, rollouts: Artifact, server: Server, **keys: Any) -> list[str]:
    """The same from the command line."""
    fields = {"kind": "judge", "url": f"{server.url}/v1", "model": "judge", "cache": tmp_path / "cache", **keys}
    fields |= {"rollouts": rollouts.path, "output": tmp_path / "scores"}
    return ["score", *(f"{name}={value}" for name, value in fields.items())]


def values(scores: Artifact) -> list[float]:
    return [row.score for row in scores.rows(Score)]


def test_a_judge_rates_every_answer_and_what_it_costs_is_counted(tmp_path: Path, answers: Artifact) -> None:
    with serving(rate) as server:
        found = score(tmp_path, answers, server, price_prompt=1000.0, price_completion=2000.0)
    assert values(found) == [6, 7, 7, 5, 6, 6]
    row = next(found.rows(Score))
    assert row.extras == {"explanation": "Well. Rating: 9\nNo, I was wrong.\n**Rating:** 6/10"}
    assert len(server.asked) == 6
    (body,) = [body for body in server.asked if answer_in(body) == "great ."]
    text = body["messages"][0]["content"]
    assert "user:\nreview the film" in text
    assert "[Known answer, which is right]\ngreat\n" in text
    assert (body["model"], body["temperature"], body["seed"], body["max_tokens"]) == ("judge", 0, 0, 1024)
    facts = found.manifest.facts
    assert (facts["answers"], facts["answers_paid"]) == (6, 6)
    assert (facts["prompt_tokens_paid"], facts["completion_tokens_paid"]) == (600, 60)
    assert facts["cost"] == pytest.approx(0.6 + 0.12)
    assert "anew may say else" in facts["repeatable"]


def test_no_answer_is_paid_for_twice_by_any_run_wherever_the_model_is_served(tmp_path: Path, answers: Artifact) -> None:
    with serving(rate) as server:
        first = score(tmp_path, answers, server)
    with serving(rate) as elsewhere:
        again = score(tmp_path, answers, elsewhere, "again", name="other")
        assert elsewhere.asked == []
        assert again.manifest.facts["answers_paid"] == 0
        score(tmp_path, answers, elsewhere, "warmer", temperature=0.5)
        assert len(elsewhere.asked) == 6
    assert again.manifest.digest == first.manifest.digest
    (torn, *_) = sorted((tmp_path / "home/answers").rglob("*.json"))
    torn.write_bytes(torn.read_bytes()[:-3])
    with serving(rate) as server:
        score(tmp_path, answers, server, "third", name="third")
        score(tmp_path, answers, server, "fourth", name="fourth", temperature=0.5)
        assert len(server.asked) == 1


def test_identical_answers_are_asked_about_once(tmp_path: Path) -> None:
    rollouts = publish_rollouts(tmp_path / "rollouts", [make_rollout(0, ["good ."] * 5)])
    with serving(rate) as server:
        found = score(tmp_path, rollouts, server)
    assert values(found) == [6] * 5
    assert len(server.asked) == 1
    assert (found.manifest.facts["answers"], found.manifest.facts["answers_paid"]) == (5, 1)


def test_votes_have_seeds_of_their_own_and_their_mean_counts(tmp_path: Path, answers: Artifact) -> None:
    with serving(lambda handler, body: handler.say(f"Rating: {1 + body['seed'] % 3 * 4}")) as server:
        found = score(tmp_path, answers, server, votes=3, temperature=1.0)
        assert Counter(body["seed"] for body in server.asked) == {0: 6, 1: 6, 2: 6}
        assert values(found) == [5] * 6
        first = next(found.rows(Score))
        assert (first.extras, first.parts) == ({"explanation": "Rating: 1"}, {"vote_1": 1, "vote_2": 5, "vote_3": 9})
        score(tmp_path, answers, server, "more", votes=4, temperature=1.0)
        assert len(server.asked) == 24, "the first three votes are known"


def test_concurrency_is_a_cap(tmp_path: Path) -> None:
    rollouts = publish_rollouts(tmp_path / "rollouts", make_rollouts(6, 4), shard=99)

    together = threading.Barrier(3)

    def slowly(handler: Handler, body: dict[str, Any]) -> None:
        together.wait(60)
        time.sleep(0.02)  # for more than three to come
        handler.say("Rating: 3")

    with serving(slowly) as server:
        score(tmp_path, rollouts, server, concurrency=3)
    assert server.most_at_once == 3


READ = {
    "Rating: 7": 7,
    "Rating: 7/10. In words: seven.": 7,
    "first Rating: 2, and then **Rating:** `8`": 8,
    "RATING = [[4]]": 4,
    "7": 7,
    " **[[7]]**\n": 7,
    "Rating: 6.5": 6.5,
    "Rating: 11": None,
    "Rating: -1": None,
    "Rating (1-10): 7": None,
    "Rating: 1.2.3": None,
    "7 and 8": None,
    "I cannot rate this.": None,
    "": None,
    "<think>Rating: 3</think>Rating: 9": 9,
    "<think>Rating: 3</think>I cannot.": None,
    "<think>hm</think>\n\n4": 4,
    "Rating: nan": None,
    "The rating of 5 stars": None,
}


@pytest.mark.parametrize("text", READ)
def test_what_a_rating_is(text: str) -> None:
    assert ReplyParser("pattern", RATING, "", (1, 10))(Reply(text, "stop", 1, 1)) == READ[text]
    assert ReplyParser("pattern", RATING, "", (1, 10))(Reply(text, "length", 1, 1)) is None


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("Verdict: A", 1), ("verdict: **B**", 0), ("Verdict: tie", 0.5), ("A", 1), ("Verdict: a tie", None),
        ("Answer A is good. Verdict: Answer B.", 0), ("Verdict: C", None), ("A good answer", None), ("tie", 0.5),
    ],
)  # fmt: skip
def test_what_a_verdict_is(text: str, value: float | None) -> None:
    verdicts = {"a": 1.0, "b": 0.0, "tie": 0.5}
    assert ReplyParser("pattern", VERDICT, "", verdicts)(Reply(text, "stop", 1, 1)) == value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ('{"explanation": "a {b}", "judgement": 7}', 7), ('```json\n{"judgement": "7"}\n```', 7),
        ('{"judgement": true}', None),
        ('{"judgement": NaN}', None), ('{"judgement": 70}', None), ('{"other": 7}', None), ('{"judgement": 7', None),
        ('{"judgement": 2} or rather {"judgement": 3} {x}', 3), ('{"judgement": null}', None), ("[" * 5000, None),
        ('{"judgement": [7]}', None), ("{" * 3000 + '{"judgement": 4}', 4),
    ],
)  # fmt: skip
def test_a_rating_in_json(text: str, value: float | None) -> None:
    assert ReplyParser("json", RATING, "judgement", (1, 10))(Reply(text, "stop", 1, 1)) == value


def test_the_mean_of_what_could_stand_in_the_ratings_place() -> None:
    reading = ReplyParser("logprobs", RATING, "", (1, 5))
    top = [("4", -0.5), (" 5", -1.5), ("5", -3.0), ("good", -0.1), ("9", -1.0), ("1", float("-inf"))]
    tokens = [Token("Rating", []), Token(":", []), Token(" 4", top), Token(".", [("5", -0.1)])]
    four, five = math.exp(-0.5), math.exp(-1.5) + math.exp(-3.0)
    assert reading(Reply("", "length", 1, 1, tokens)) == pytest.approx((4 * four + 5 * five) / (four + five))
    assert reading(Reply("4", "length", 1, 1, [Token("4", top)])) is not None
    assert reading(Reply("", "stop", 1, 1, [Token("Rating: 4", top)])) is None, "not a token of its own"
    assert reading(Reply("4", "stop", 1, 1, [Token("4", [("good", -0.1)])])) is None
    assert reading(Reply("4", "stop", 1, 1, None)) is None


def test_an_answer_without_a_rating_is_asked_for_again_and_then_dropped(tmp_path: Path, answers: Artifact) -> None:
    def often_nonsense(handler: Handler, body: dict[str, Any]) -> None:
        answer = answer_in(body)
        if answer == "bad .":
            handler.say(None)
        elif answer == "good ." and body["seed"] < 2000:
            handler.say("As a language model I like it.")
        else:
            rate(handler, body)

    with serving(often_nonsense) as server:
        found = score(tmp_path, answers, server, max_dropped=0.2)
        assert values(found) == [6, 7, 7, 6, 6]
        assert found.manifest.ledger.dropped == {"no_judgement": 1}
        assert Counter(answer_in(body) for body in server.asked)["bad ."] == 3
        assert found.manifest.facts["answers_without_reading"] == 5
        count = len(server.asked)
        again = score(tmp_path, answers, server, "again", max_dropped=0.3)
        assert len(server.asked) == count, "nonsense has been paid for as well"
        assert again.manifest.digest == found.manifest.digest
        with pytest.raises(UserError, match=r"1 no_judgement is more than max_dropped=0.1"):
            score(tmp_path, answers, server, "strict")


def test_a_judge_that_never_judges_is_quoted_and_not_asked_to_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JUDGE_KEY", "very-secret-1234")
    rollouts = publish_rollouts(
        tmp_path / "rollouts", [make_rollout(number, ["good .", "great .", "bad ."]) for number in range(20)]
    )
    keys = {"key_variable": "JUDGE_KEY", "concurrency": 1, "asks": 1}
    nothing = "I cannot say; very-secret-1234. " + "Well, " * 100
    with serving(lambda handler, body: handler.say(nothing)) as server:
        with pytest.raises(UserError, match="none of the first 16 judgements could be read") as told:
            score(tmp_path, rollouts, server, **keys)
        assert len(server.asked) <= 16
        message = str(told.value)
        assert "the judge replied 'I cannot say; ***. Well, Well," in message
        assert "very-secret" not in message
        assert len(message) < 700
        assert "extraction=pattern finds no judgement" in message
        assert "max_tokens" not in message
        with pytest.raises(UserError, match=r"60 samples in = 0 kept \+ 60 no_judgement .*'I cannot say"):
            score(tmp_path, rollouts, server, "tolerant", max_dropped=0.9, **keys)
    cut = pytest.raises(UserError, match=r"'Let me think', cut off by max_tokens=7\. Raise max_tokens")
    with cut, serving(lambda handler, body: handler.say("Let me think", "length")) as server:
        score(tmp_path, rollouts, server, "cut", max_tokens=7, **keys)


PASSING = {
    "429": lambda handler: handler.reply({"error": "slow down"}, 429, Retry_After="0.2"),
    "503": lambda handler: handler.reply(b"", 503),
    "html": html,
    "cut off": cut_off,
    "drip": drip,
    "no choices": lambda handler: handler.reply({"choices": []}),
    "a number": lambda handler: handler.reply(7),
    "no text": lambda handler: handler.say(["a"]),
    "negative usage": lambda handler: handler.say("Rating: 3", usage={"prompt_tokens": -3}),
    "closed": lambda handler: setattr(handler, "close_connection", True),
    "gzip": lambda handler: handler.reply(b"nonsense", Content_Encoding="gzip"),
}


@pytest.mark.parametrize("fault", PASSING)
def test_what_passes_is_asked_again_and_what_does_not_is_never_a_score(
    tmp_path: Path, answers: Artifact, fault: str
) -> None:
    seen: Counter[str] = Counter()

    def behave(handler: Handler, body: dict[str, Any]) -> None:
        answer = answer_in(body)
        seen[answer] += 1
        if answer == "bad ." or (answer == "good ." and seen[answer] == 1):
            PASSING[fault](handler)
        else:
            rate(handler, body)

    timeout = 2.0 if fault == "drip" else 60.0
    with serving(behave) as server:
        found = score(tmp_path, answers, server, retries=1, timeout=timeout, fail_on_error=0.2)
        assert values(found) == [6, 7, 7, 6, 6]
        assert found.manifest.ledger.dropped == {"failed": 1}
        assert seen["bad ."] == seen["good ."] == 2
        assert found.manifest.facts["requests_repeated"] == 2
        (failure,) = found.manifest.facts["failures"]
        assert re.search(r"sample 1: (http://127|the endpoint's reply)", failure)
        with pytest.raises((UserError, TransientError), match="sample 1"):
            score(tmp_path, answers, server, "strict", retries=0, timeout=timeout)


def test_a_judge_that_asks_for_patience_is_left_alone_by_all(tmp_path: Path, answers: Artifact) -> None:
    moments: list[float] = []

    def busy(handler: Handler, body: dict[str, Any]) -> None:
        moments.append(time.monotonic())
        if len(moments) == 1:
            handler.reply({}, 429, Retry_After="0.6")
        else:
            rate(handler, body)

    with serving(busy) as server:
        score(tmp_path, answers, server, concurrency=1)
        assert moments[1] - moments[0] > 0.55
    with serving(lambda handler, body: handler.reply({}, 429, Retry_After="86400")) as server:
        with pytest.raises(TransientError, match=r"replied 429.* It asks for a pause of 86400 s \(Retry-After\)"):
            score(tmp_path, answers, server, "later", name="later", seed=5)
        assert len(server.asked) <= 6, "nobody waits for a day"


REFUSED = {
    "replied 401: .*key_variable": lambda handler, key: handler.reply({"error": f"wrong key {key}"}, 401),
    "replied 404: .*Check url and model": lambda handler, key: handler.reply({"error": "no such model"}, 404),
    "a redirect to http://elsewhere": lambda handler, key: handler.reply(
        {}, 307, Location=f"http://elsewhere/?k={key}"
    ),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_every_request_would_meet_ends_the_stage_and_the_key_is_never_shown(
    tmp_path: Path, answers: Artifact, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = "very-secret-1234"
    monkeypatch.setenv("JUDGE_KEY", key)
    with serving(lambda handler, body: REFUSED[message](handler, key)) as server:
        with pytest.raises(UserError, match=message) as told:
            score(tmp_path, answers, server, key_variable="JUDGE_KEY", fail_on_error=0.9, concurrency=1)
        assert len(server.asked) == 1
    assert server.keys == [f"Bearer {key}"]
    assert key not in str(told.value)
    with serving(rate) as server:
        found = score(tmp_path, answers, server, key_variable="JUDGE_KEY")
    written = [path for path in tmp_path.rglob("*") if path.is_file() and key.encode() in path.read_bytes()]
    assert written == []
    assert "JUDGE_KEY" not in json.dumps(found.manifest.key_parts)


def test_what_is_wrong_with_one_request_fails_its_sample_only(tmp_path: Path, answers: Artifact) -> None:
    def picky(handler: Handler, body: dict[str, Any]) -> None:
        if answer_in(body) == "bad .":
            handler.reply({"error": {"message": "the context is too long"}}, 400)
        else:
            rate(handler, body)

    with serving(picky) as server:
        found = score(tmp_path, answers, server, fail_on_error=0.2)
        assert found.manifest.ledger.dropped == {"failed": 1}
        assert "400" in found.manifest.facts["failures"][0]
        assert len(server.asked) == 6, "it is not asked again"


def test_a_judge_that_is_down_is_a_failure_that_may_pass(tmp_path: Path, answers: Artifact) -> None:
    with serving(rate) as server:
        pass
    with pytest.raises(TransientError, match="could not be reached, or closed the connection"):
        score(tmp_path, answers, server, retries=1, timeout=2.0)
    with pytest.raises(TransientError, match=r"of 6 samples failed so far, more than fail_on_error=0.3"):
        score(tmp_path, answers, server, retries=0, timeout=2.0, fail_on_error=0.3)


LIMITS = {
    "max_tokens_total": ({"max_tokens_total": 300}, "330 tokens, and max_tokens_total is 300"),
    "max_cost": ({"max_cost": 0.3, "price_prompt": 1000.0}, "0.3, and max_cost is 0.3"),
}


@pytest.mark.slow
@pytest.mark.parametrize("limit", LIMITS)
def test_a_limit_stops_the_stage_and_nothing_is_lost(tmp_path: Path, answers: Artifact, limit: str) -> None:
    keys, message = LIMITS[limit]
    with serving(rate) as server:
        whole = score(tmp_path, answers, server, "whole", seed=7)
        server.asked.clear()
        for _ in range(2):
            ended = run_cli(*command(tmp_path, answers, server, concurrency=1, **keys), check=False)
            assert (ended.returncode, len(server.asked)) == (2, 3)
            assert ended.stderr.count("error: ") == 1
            assert message in ended.stderr
        found = score(tmp_path, answers, server, concurrency=1, cache=tmp_path / "cache")
        assert len(server.asked) == 6
        assert found.manifest.digest == whole.manifest.digest
        assert found.manifest.facts["answers_paid"] == 6
    assert not list(tmp_path.glob(".scores*"))


def test_a_limit_that_cannot_be_held_is_refused(tmp_path: Path, answers: Artifact) -> None:
    with serving(lambda handler, body: handler.say("Rating: 3", usage={})) as server:
        with pytest.raises(UserError, match="does not say how many tokens"):
            score(tmp_path, answers, server, max_tokens_total=1000)
        assert values(score(tmp_path, answers, server, "unlimited")) == [3] * 6


@pytest.mark.slow
def test_what_was_answered_is_paid_for_once_however_often_the_stage_is_killed(tmp_path: Path) -> None:
    """SIGKILL in mid-flight, and SIGTERM once, by which what is under way comes to its end: what had been answered is
    not asked again, and the bytes are those of a stage that nobody has killed."""
    rollouts = publish_rollouts(tmp_path / "rollouts", make_rollouts(10, 4), shard=5)

    replies = threading.Semaphore(1000)

    def rarely(handler: Handler, body: dict[str, Any]) -> None:
        replies.acquire()
        handler.say(f"Rating: {1 + len(answer_in(body)) % 9}")

    kills = (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL)
    with serving(rarely) as server:
        whole = score(tmp_path, rollouts, server, "whole", cache=tmp_path / "other")
        server.asked.clear()
        arguments = command(tmp_path, rollouts, server, concurrency=4)
        for number in kills:
            wait_until(lambda: server.at_once == 0)
            server.replied.clear()
            replies = threading.Semaphore(7)
            stage = start_stage("annotation", *arguments)
            wait_until(lambda: len(server.replied) == 7 and server.at_once == 4, stage)
            stage.send_signal(number)
            if number == signal.SIGKILL:
                stage.wait()
            replies.release(1000)
            stage.communicate(timeout=200)
            assert stage.returncode == (128 + number if number == signal.SIGTERM else -number)
        run_cli(*arguments)
    found = Artifact.open(tmp_path / "scores")
    assert found.manifest.digest == whole.manifest.digest
    asked = Counter(answer_in(body) for body in server.asked)
    repeated = sum(asked.values()) - len(asked)
    assert repeated <= 4 * 2, "none but what was under way at a SIGKILL"
    kept = {path.stem for path in (tmp_path / "cache").rglob("*.json")}
    assert len(kept) == len(asked)
    facts = found.manifest.facts
    assert facts["answers_paid"] <= len(asked), "each is counted once"
    assert facts["answers_paid"] >= len(asked) - len(kills)


def wait_until(condition: Callable[[], bool], stage: WarmStage | None = None) -> None:
    deadline = time.monotonic() + 100
    while not condition():
        assert time.monotonic() < deadline
        assert stage is None or stage.poll() is None
        time.sleep(0.005)


def findings(**keys: Any) -> list[tuple[str, str]]:
    """Of preflight."""
    fields = {"kind": "judge", "model": "judge", "output": "preflight", "rollouts": "made-by/generation", **keys}
    stage = Inspected("reward", score_config(**fields), frozenset(["rollouts"]), ())
    return [(finding.level, finding.found) for finding in findings_of(lambda: check_scorer(stage))]


def test_preflight_asks_the_endpoint_and_looks_for_the_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    template = tmp_path / "template.txt"
    template.write_text("{{ response }} {{ nothing }}")
    with serving(rate) as server:
        url = f"{server.url}/v1"
        assert findings(url=url) == [("ok", f"{url} serves judge")]
        ((level, found),) = findings(url=url, model="jugde")
        assert (level, "Did you mean 'judge'?" in found) == ("error", True)
        for key in ("", "sch\u00f6n", "two\nlines"):
            monkeypatch.setenv("JUDGE_KEY", key)
            assert findings(url=url, key_variable="JUDGE_KEY")[0][0] == "error"
        for keys, message in (
            ({"template": "{{ response"}, "template, line 1"),
            ({"template_file": template}, "'nothing' is undefined"),
            ({"template": "Is it good?"}, "does not show {{ response }}"),
            ({"template_file": "nowhere.txt"}, "cannot be read"),
        ):
            ((level, found),) = findings(url=url, **keys)
            assert (level, message in found) == ("error", True), found
        assert len(server.asked) == 0
    ((level, found),) = findings(url=url)
    assert (level, "could not be reached" in found) == ("warning", True)


MISTAKES = {
    "it is not an HTTP URL": {"url": "localhost:8000"},
    "holds a name or a password": {"url": "http://me:secret@host/v1"},
    "url is the API's base": {"url": "http://host/v1/chat/completions"},
    "are one vote": {"votes": 3},
    "are two questions": {"template": "{{ response }}", "template_file": "x"},
    "rubric is for the built-in question": {"template": "{{ response }}", "rubric": "x"},
    "max_cost needs prices": {"max_cost": 1.0},
    "pattern has no group": {"pattern": "[0-9]"},
    "pattern is not a regular expression": {"pattern": "("},
    "ratings of one digit": {"extraction": "logprobs"},
    "is not below highest": {"lowest": 10},
    "looks like a secret": {"request": {"api_key": "x"}},
}


@pytest.mark.parametrize("message", MISTAKES)
def test_a_judge_that_cannot_be_meant_is_refused(message: str) -> None:
    with pytest.raises(UserError, match=message):
        score_config(
            kind="judge", model="m", output="o", rollouts="r", **{"url": "http://host/v1", **MISTAKES[message]}
        )


def the_longer(handler: Handler, body: dict[str, Any]) -> None:
    """Prefers the longer answer, and of two equally long ones the first."""
    first, second = re.findall(r"\[Answer [AB]\]\n(.*)\n\[End", body["messages"][-1]["content"])
    handler.say(f"Verdict: {'A' if len(first) >= len(second) else 'B'}")


def test_a_judge_compares_all_answers_in_both_orders(tmp_path: Path) -> None:
    texts = [["good .", "great great .", "blue .", "good ."], ["awful .", "awful ."]]
    rollouts = publish_rollouts(tmp_path / "rollouts", [make_rollout(number, one) for number, one in enumerate(texts)])
    with serving(the_longer) as server:
        found = score(tmp_path, rollouts, server, kind="pairwise_judge")
        assert len(server.asked) == 6, "three different answers to the first prompt, in both orders"
        assert values(found) == pytest.approx([1 / 3, 1, 1 / 6 + 1 / 6, 1 / 3, 0.5, 0.5])
        facts = found.manifest.facts
        assert (facts["comparisons"], facts["consistency"]) == (3, 2 / 3)
        assert next(found.rows(Score)).extras == {"against": "great great .", "explanation": "Verdict: B"}
        against = score(
            tmp_path, rollouts, server, "against", kind="pairwise_judge", against=rollouts.path, opponents=1
        )
        assert values(against)[:2] == [0.5, 1]
        server.behaviour = lambda handler, body: handler.say("Verdict: tie")
        tied = score(tmp_path, rollouts, server, "tied", kind="pairwise_judge", seed=3)
        assert (set(values(tied)), tied.manifest.facts["consistency"]) == ({0.5}, 1.0)
        with pytest.raises(UserError, match="kind=pairwise_judge compares all answers"):
            score(tmp_path, rollouts, server, "pairs", kind="pairwise_judge", pairs=rollouts.path)


def test_verdicts_by_log_probabilities_and_comparisons_without_one(tmp_path: Path) -> None:
    rollouts = publish_rollouts(tmp_path / "rollouts", [make_rollout(0, ["good .", "great .", "blue ."])])

    def unsure(handler: Handler, body: dict[str, Any]) -> None:
        assert (body["logprobs"], body["top_logprobs"]) == (True, 20)
        first, second = re.findall(r"\[Answer [AB]\]\n(.*)\n\[End", body["messages"][-1]["content"])
        if "blue ." in (first, second):
            handler.say("neither")
            return
        better = 0.8 if first == "great ." else 0.4
        top = [{"token": "A", "logprob": math.log(better / 2)}, {"token": " B", "logprob": math.log((1 - better) / 2)}]
        handler.say("B", "length", logprobs={"content": [{"token": "B", "top_logprobs": top}]})

    with serving(unsure) as server:
        keys = {"kind": "pairwise_judge", "extraction": "logprobs", "max_tokens": 1, "asks": 2, "max_dropped": 0.4}
        found = score(tmp_path, rollouts, server, **keys)
    assert values(found) == pytest.approx([0.3, 0.7])
    assert found.manifest.ledger.dropped == {"no_judgement": 1}
    assert len(server.asked) == 2 + 4 * 2
