"""A judge behind a vLLM server of this project: it is the judge of annotation, and here where vLLM is installed."""

from pathlib import Path
from typing import Any

import pytest

from annotation.scorers import score_config
from annotation.stages.score import SCORE
from contracts.artifacts import Artifact
from contracts.errors import UserError
from contracts.ledger import Ledger
from contracts.prompts import prompt_id
from contracts.publication import Publication
from contracts.records import ROLLOUTS, Completion, Message, Rollout, Score
from contracts.stage import run_stage
from generation.config import GenerationConfig
from generation.engine import EngineSettings

SPECIAL = ["<pad>", "<bos>", "<eos>", "<unk>", "<user>", "<assistant>"]
RATINGS = ["1", "2", "3", "4", "5"]
WORDS = [*RATINGS, "A", "B", "good", "bad", "long", "rate", "compare", "and", "or"]
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %} <{{ message.role }}> {{ message.content }}{% endfor %}"
    "{% if add_generation_prompt %} <assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of so few tokens that the most likely 20 are all."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("judge") / "judge"
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(SPECIAL + WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>",
        additional_special_tokens=["<user>", "<assistant>"], chat_template=TEMPLATE,
    )  # fmt: skip
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(SPECIAL + WORDS), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, head_dim=32, max_position_embeddings=64, initializer_range=0.25,
        bos_token_id=1, eos_token_id=2, pad_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def publish_answers(path: Path, texts: list[str]) -> Artifact:
    messages = (Message("user", "good ?"),)
    completions = tuple(Completion(sample, (2,), text, "stop", (), None, None) for sample, text in enumerate(texts))
    row = Rollout(prompt_id(messages), messages, (1,), completions, "policy", 0, "raw")
    publication = Publication(path, ROLLOUTS, "generation", "0" * 64)
    publication.begin()
    publication.write_rows("shard-00000.jsonl", [row], Ledger("prompts", 1, 1))
    return publication.publish(
        key_parts={}, inputs={}, input_paths={}, unit="prompts", weights=None, versions={}, seconds={}, facts={}
    )


def chances(judge: Path, text: str, among: list[str]) -> list[float]:
    """What transformers says of the next token, of some only."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(judge)
    model = AutoModelForCausalLM.from_pretrained(judge)
    ids = tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True)
    ids = ids["input_ids"] if not isinstance(ids, list) else ids
    with torch.inference_mode():
        logits = model(torch.tensor([ids])).logits[0, -1]
    found: list[float] = logits[tokenizer.convert_tokens_to_ids(among)].softmax(0).tolist()
    return found


@pytest.mark.slow
def test_a_judge_behind_our_own_server_rates_as_the_model_itself_would(
    judge: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("vllm", reason="vLLM is in the generation environment only", exc_type=ImportError)
    from generation.vllm_server import VllmServer

    texts = ["good", "bad", "long long", "good bad"]
    rollouts = publish_answers(tmp_path / "rollouts", texts)
    settings = EngineSettings(stop_ids=(2,), max_length=64, dtype="float32", on_gpu=False, log=tmp_path / "log")
    server = VllmServer(GenerationConfig(policy=judge, prompts="unused", output="unused"), settings)
    monkeypatch.setenv("JUDGE_KEY", server._key)
    url = f"{server._address}/v1"
    fields = {
        "rollouts": rollouts.path, "model": str(judge), "url": url, "key_variable": "JUDGE_KEY",
        "cache": tmp_path / "cache", "extraction": "logprobs", "max_tokens": 1,
    }  # fmt: skip

    def score(output: str, **keys: Any) -> Artifact:
        found = run_stage(SCORE, score_config(output=tmp_path / output, **{**fields, **keys}))
        assert found is not None
        return found

    def only(among: list[str]) -> dict[str, Any]:
        """Keeps the model to some tokens; its log-probabilities stay what they are."""
        return {"allowed_token_ids": [(SPECIAL + WORDS).index(word) for word in among]}

    rating = {"kind": "judge", "highest": 5, "template": "rate {{ response }}", "request": only(RATINGS)}
    compare = {"kind": "pairwise_judge", "template": "compare {{ first }} {{ second }}", "request": only(["A", "B"])}
    try:
        rated = score("rated", **rating)
        compared = score("compared", **compare, opponents=2)
        with pytest.raises(UserError, match="replied 404"):
            score("other", **rating, model="another")
        monkeypatch.setenv("JUDGE_KEY", "wrong")
        with pytest.raises(UserError, match=r"replied 401: .*Check key_variable"):
            score("refused", **rating, seed=1)
    finally:
        server.close()
    expected = [
        sum(number * chance for number, chance in enumerate(chances(judge, f"rate {text}", RATINGS), 1))
        for text in texts
    ]
    assert [row.score for row in rated.rows(Score)] == pytest.approx(expected, abs=1e-4)
    facts = rated.manifest.facts
    assert (facts["answers_paid"], facts["completion_tokens_paid"]) == (4, 4)

    def better(first: str, second: str) -> float:
        forwards, _ = chances(judge, f"compare {first} {second}", ["A", "B"])
        backwards, _ = chances(judge, f"compare {second} {first}", ["A", "B"])
        return (forwards + 1 - backwards) / 2

    assert next(compared.rows(Score)).score == pytest.approx(
        (better("good", "bad") + better("good", "good bad")) / 2, abs=1e-4
    )
    again = score("again", **rating, name="again")
    assert [row.score for row in again.rows(Score)] == [row.score for row in rated.rows(Score)], "from what is kept"
