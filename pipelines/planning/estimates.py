"""How much memory and disk a stage takes, before it runs. Arithmetic on configs and sizes; no torch.

P is a model's number of parameters, T how many of them are trained, N the tokens of a batch, V the vocabulary, h the
hidden size, i the width of the feed-forward layers, q and k those of queries and keys, a the bytes of a number.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from annotation.config import EvaluationConfig, PairsConfig, ScoreConfig
from contracts.architectures import FLAT
from contracts.prompts import PromptsConfig
from contracts.stage import MINIMUM_FREE
from embedded.config import WorldConfig
from generation.config import GenerationConfig
from pipelines.graph import Graph, Node
from pipelines.machine import gpu_count
from pipelines.planning.sizes import (
    TEMPLATE_TOKENS,
    WORLD_ROW,
    Answers,
    Size,
    answers_of,
    experience_of,
    pairs_of,
    rows_of,
    size_of,
)
from training.config import (
    CriticConfig,
    EmaConfig,
    ExperienceConfig,
    PolicyConfig,
    RewardConfig,
    SftConfig,
    TrainingConfig,
    ValueHeadConfig,
)

PROCESS = 640 << 20
"""Python, torch and its kernels in one process."""
HEAD_CHUNK = 2048
"""Positions whose logits exist at once in training (modeling/logprobs.py)."""
REFERENCE_CHUNK = 512
"""Those of a reference model beside the policy (modeling/divergence.py)."""
LOGITS_AT_ONCE = 1 << 26
"""Logits that exist at once in scoring by log-probabilities (annotation/logprobs.py)."""
PADDING_SHARE = 1.25
"""Padding of the groups of sequences that attention takes flat batches apart into (modeling/packing.py)."""
COLUMNS = 20
"""Numbers for each response token that an experience stage holds at once, those of GAE among them."""
BUCKET = 500_000_000
"""Numbers in DeepSpeed's buffer for the gradients under way (reduce_bucket_size)."""

FILE = 8 << 10
"""A small file on the disk, with its receipt and the rest of its last block."""
STAGE = 64 << 10
"""Manifest, logs and the small files of a stage."""
ID, LOGPROB, TEXT = 7, 24, 9
"""Bytes of a token in JSON: as an id with its comma, as a log-probability, and as text."""
SAMPLE = 256
"""Bytes that an answer, or the score of one, has beside its tokens."""
ROLLOUT, PAIR = 512, 640
"""The same for a prompt with its answers, and for a pair."""
LINE = 512
"""Bytes of an optimizer step in the training log."""


def disk_bytes(node: Node, graph: Graph) -> int:
    """Bytes that a stage may need on the disk: what it publishes, and what it keeps while it runs.

    Where the size of its inputs cannot be known, as little as any stage must have (contracts.stage.MINIMUM_FREE).
    """
    published = published_bytes(node, graph)
    return MINIMUM_FREE if published is None else published + scratch_bytes(node, graph)


def published_bytes(node: Node, graph: Graph) -> int | None:
    """Bytes that a stage publishes, rather too many than too few; None where that cannot be known.

    prompts       the source's bytes, and 160 a row
    generation    prompts · (8 · text + 512) + prompts · K · (max_new_tokens · 40 + 256): a token is an id (7), a
                  log-probability (24) and text (9); a prompt's ids take 7 for each byte of its text at most
    score         answers · 256, and for log-probabilities and values max_new_tokens · 24 an answer
    experience    prompts · (8 · text + 512) + answers · (256 + max_new_tokens · (7 + 24 · c)), with c numbers a token
    pairs         2 · pairs · (9 · prompt + 2 · max_new_tokens · 16 + 640): as JSONL and as Parquet
    training      P · 4 (in bf16 2, and 2 for what is missing to fp32), the tokenizer, and 512 for each step's log line
    ema           P · 4 and the tokenizer
    value-head    P · 4 and the tokenizer
    """
    config = node.config
    if isinstance(config, TrainingConfig):
        size, log = size_of(node.output, graph), LINE * (_steps(config, graph) or 0)
        return None if size is None else size.checkpoint_bytes(4) + log + STAGE
    if isinstance(config, EmaConfig | ValueHeadConfig):
        size = size_of(node.output, graph)
        return None if size is None else size.checkpoint_bytes(4) + STAGE
    if isinstance(config, WorldConfig):
        size = size_of(node.output / "model", graph)
        rows = config.demonstrations + config.train + config.preference + config.heldout
        head = 0 if size is None else size.vocabulary * size.hidden  # its tied head is written twice
        return None if size is None else size.checkpoint_bytes(4) + 4 * head + rows * WORLD_ROW + STAGE
    if isinstance(config, PromptsConfig):
        prompts = rows_of(node.output, graph)
        return None if prompts is None else prompts.bytes + STAGE
    if isinstance(config, EvaluationConfig):
        return STAGE
    return _published_rows(config, node, graph)


def _published_rows(config: Any, node: Node, graph: Graph) -> int | None:
    """`published_bytes` of generation, scores, pairs and experience."""
    rollouts = node.output if isinstance(config, GenerationConfig) else config.rollouts
    answers = answers_of(rollouts, graph)
    if answers is None:
        return None
    prompts, tokens = answers.prompts, answers.longest_answer
    if isinstance(config, PairsConfig):
        found = pairs_of(node.output, graph)
        assert found is not None
        text = (2 + ID) * prompts.bytes // max(1, prompts.count)
        return 2 * found[0] * (text + 2 * tokens * (ID + TEXT) + PAIR) + STAGE
    prompt_bytes = (1 + ID) * prompts.bytes + prompts.count * ROLLOUT
    if isinstance(config, ExperienceConfig):
        numbers = 2 + (config.reference is not None) + 2 * (config.values is not None)
        return prompt_bytes + answers.count * (SAMPLE + tokens * (ID + numbers * LOGPROB)) + STAGE
    files = shards_of(rollouts, graph) * FILE
    if isinstance(config, ScoreConfig):
        count = answers.count
        if config.pairs is not None and (found := pairs_of(config.pairs, graph)):
            count = min(count, 2 * found[0])
        return count * (SAMPLE + (tokens * LOGPROB if config.kind in ("logprobs", "values") else 0)) + files + STAGE
    answer_bytes = answers.count * (tokens * (ID + LOGPROB + TEXT) + SAMPLE)
    return prompt_bytes + answer_bytes + files + STAGE


def scratch_bytes(node: Node, graph: Graph) -> int:
    """Bytes that a stage needs while it runs and gives back.

    The state that a training can go on from after a kill is T parameters and AdamW's two moments in fp32 (12 T; 4 T for
    SGD), and for an instant twice that, because the file is replaced by a whole new one.
    """
    config = node.config
    size = size_of(node.output, graph) if isinstance(config, TrainingConfig) else None
    if size is None:
        return 0
    assert isinstance(config, TrainingConfig)
    return 2 * (12 if config.optimizer == "adamw" else 4) * trained_numbers(config, size)


def shards_of(rollouts: Path, graph: Graph) -> int:
    """Files that the rows of a generation stage are published in; by default 8 · max_num_seqs / K prompts in each."""
    owner, answers = graph.owner(rollouts), answers_of(rollouts, graph)
    config = graph.nodes[owner].config if owner else None
    if answers is None or not isinstance(config, GenerationConfig):
        return 1
    return -(-answers.prompts.count // (config.shard_size or max(1, 8 * config.max_num_seqs // config.k)))


def _steps(config: TrainingConfig, graph: Graph) -> int | None:
    """Optimizer steps of a training, at most."""
    if config.max_steps is not None:
        return config.max_steps
    rows = 0
    if isinstance(config, SftConfig):
        found = rows_of(config.demonstrations, graph)
        if found is None:
            return None
        rows = found.count
    elif (experience := _experience(config)) is not None:
        answers = experience_of(experience, graph)
        if answers is None:
            return None
        rows = answers.prompts.count
    elif isinstance(config, PolicyConfig | RewardConfig):
        for path in config.pairs:
            pairs = pairs_of(path, graph)
            if pairs is None:
                return None
            rows += pairs[0]
    return config.epochs * -(-rows // config.global_batch)


def _experience(config: TrainingConfig) -> Path | None:
    """The experience that a training reads, if it does."""
    return config.experience if isinstance(config, PolicyConfig | CriticConfig) else None


def number_bytes(config: TrainingConfig, on_gpu: bool | None = None) -> int:
    """Bytes of a number that training computes with and publishes: `auto` is bf16 on a GPU, fp32 on a CPU."""
    on_gpu = gpu_count() > 0 if on_gpu is None else on_gpu
    return 2 if config.dtype == "bfloat16" or (config.dtype == "auto" and on_gpu) else 4


@dataclass(frozen=True)
class Memory:
    """Memory that a stage takes, of a GPU where there is one, of the machine elsewhere."""

    parts: dict[str, int]
    """Bytes of one process, on one device, by what they are for."""
    processes: int
    """Processes at the same time; each has its devices for itself, but they share the machine's memory."""
    share: float = 1.0
    """The part of a device that the stage takes for itself and stays within."""

    @property
    def total(self) -> int:
        """Bytes of one process."""
        return sum(self.parts.values())

    @property
    def states(self) -> int:
        """The part that no batch size changes."""
        return sum(self.parts.get(name, 0) for name in ("weights", "gradients", "optimizer"))


def memory(node: Node, graph: Graph, *, on_gpu: bool) -> Memory | None:
    """Memory of a stage; None for those that take little, and where the model's size is not known."""
    config = node.config
    if isinstance(config, TrainingConfig):
        size = size_of(config.model, graph)
        if size is not None and node.stage.has_score_head(config):
            size = size.as_classifier()
        return None if size is None else training_memory(config, size, _longest_row(config, graph), on_gpu=on_gpu)
    if isinstance(config, ExperienceConfig):
        answers = answers_of(config.rollouts, graph)
        tokens = answers.count * answers.longest_answer if answers else 0
        return Memory({"numbers per token": COLUMNS * 8 * tokens, "process": PROCESS}, 1) if answers else None
    if isinstance(config, ValueHeadConfig):
        size = size_of(config.model, graph)
        return None if size is None else Memory({"weights": 2 * 4 * size.parameters, "process": PROCESS}, 1)
    if isinstance(config, EmaConfig):
        size = size_of(config.model, graph)
        return None if size is None else Memory({"weights": 3 * 4 * size.parameters, "process": PROCESS}, 1)
    if isinstance(config, GenerationConfig):
        size = size_of(config.policy, graph)
        answers = answers_of(node.output, graph)
        return None if size is None else generation_memory(config, size, answers, on_gpu=on_gpu)
    if isinstance(config, ScoreConfig) and config.model is not None:
        size, answers = size_of(config.model, graph), answers_of(config.rollouts, graph)
        return None if size is None else scoring_memory(config, size, answers, on_gpu=on_gpu)
    return None


@dataclass(frozen=True)
class LongestRow:
    """The largest row that a training may meet: one prompt with its answers, which are never divided."""

    prompt: int
    """Tokens, and so is:"""
    answer: int
    sequences: int

    @property
    def flat(self) -> int:
        """Tokens of the sequences, the prompt counted with each."""
        return self.sequences * (self.prompt + self.answer)

    @property
    def shared(self) -> int:
        """The same with the prompt counted once."""
        return self.prompt + self.sequences * self.answer


def training_memory(config: TrainingConfig, size: Size, row: LongestRow | None, *, on_gpu: bool) -> Memory:
    """Memory of a training process; `row` is the largest one, if known.

    P and T are what the process's stage has of the model: all of it, or with pp and tp its layers' part and, in the
    first or the last stage, one matrix of the vocabulary. a is 2 under bf16, else 4.

    Without sharding every process holds fp32 weights (4 P), their gradients (4 T), AdamW's moments (8 T; SGD has
    none), for plain data parallelism DDP's buckets (4 T), and under bf16 autocast bf16 copies of the weights (2 P).

    With LoRA, T is the adapters' numbers, r (in + out) for each adapted layer, and the head of a classifier. The
    weights lie there in a bytes (a P) and have no copies; adapters in fp32 (4 T) with copies, gradients and moments.

    fsdp2 divides these by n = dp · sp. It computes with two layers and the vocabulary's matrices whole, in a bytes;
    with pp it holds the whole stage so during a step, and fp32 gradients of all of it.

    With DeepSpeed: weights a (P + adapters), gradients a·T and, in fp32 for the processes' shares of the optimizer
    step, master weights, moments and gradients (4 + 8 + 4) T / n. ZeRO-2 divides the gradients by n as well, ZeRO-3 the
    weights too, but holds two layers and the embedding whole while it works on them. Gradients under way:
    a · min(T, 5e8). What is offloaded is not on a GPU.

    Activations of a layer, for each token: c h + (4 a·i + a·q + u · 2 a (q + k)) / tp bytes: residual stream, norms and
    what the projections read (c: 24, and 2 more under bf16; 8 less with LoRA, which adds 7 a·r); the feed-forward part;
    attention's output, and its queries, outputs, keys and values, taken apart into whole sequences: u is how many
    tokens these have for each of the batch (those of a row, the prompt counted with each answer, over those of the row
    as it is packed), with up to a quarter of padding. All layers keep them until the backward pass, or with
    gradient_checkpointing only their inputs (4 h) while one layer is computed again; the backward pass holds a quarter
    of a layer besides, embedding and last norm 12 h. Counted on Llama, by what autograd saves; on a CPU half as much
    again (with checkpointing 1.4 times as much again) for the holes that malloc leaves between them.

    The tokens are those of one micro-batch: micro_batch_tokens (a shared prompt counts once), but no more than the
    replica's part of a global batch, and no less than one row; sp divides them. With pp the first stage has pp
    micro-batches in flight, in a pp-th of the layers.

    Logits exist for at most 2048 positions at once, as three fp32 tensors in the backward pass, beside the head's fp32
    gradient (not with LoRA) and its copies (modeling/logprobs.py). Bradley-Terry reward models and critics have none.
    A reference model beside the policy adds its weights, in the policy's format, and six fp32 tensors of the logits of
    512 positions (modeling/divergence.py).

    When activations and logits are gone, AdamW's step on a GPU takes 4 T / n for its denominators, and the hand-off of
    merged adapters another a·P: where that is more than they were, the rest is `step`.
    """
    number = number_bytes(config, on_gpu)
    parallel, is_classifier = config.parallel, _has_score_head(config)
    total, trained, adapters = size.parameters, trained_numbers(config, size), _adapter_numbers(config, size)
    moments = 2 if config.optimizer == "adamw" else 0
    words = size.vocabulary * size.hidden
    both = 1 if size.tied or is_classifier else 2
    ends = both if parallel.pp == 1 else 1
    if parallel.pp > 1 or parallel.tp > 1:
        whole = (total - both * words) // (parallel.pp * parallel.tp) + ends * words
        trained = trained // parallel.pp if config.lora else trained * whole // total
        total, adapters = whole, adapters // parallel.pp
    sharing = parallel.dp * parallel.sp
    widest = 2 * (size.parameters // max(1, size.layers) // parallel.tp) + words
    base = number if config.lora else 4
    copies = 2 * (adapters if config.lora else total) if number == 2 else 0
    stepped = 4 * trained if on_gpu and moments else 0
    merged = 0
    parts: dict[str, int] = {}
    if parallel.zero == "fsdp2":
        computing = total if parallel.pp > 1 else min(total, widest + (ends - 1) * words)
        parts["weights"] = (base * total + 4 * adapters) // sharing + number * computing
        parts["gradients"] = 4 * trained // sharing + 4 * min(trained, computing)
        parts["optimizer"] = 4 * moments * trained // sharing
        stepped //= sharing
    elif parallel.zero == 0:
        parts["weights"] = base * total + 4 * adapters + copies
        parts["gradients"] = trained * (8 if sharing > 1 and not parallel.is_native else 4)
        parts["optimizer"] = trained * 4 * moments
        merged = number * (total - both * words) if config.lora else 0
    else:
        weights, gradients = (total + adapters) * number, trained * number
        if parallel.zero >= 2:
            gradients //= sharing
        if parallel.zero == 3:
            weights = weights // sharing + min(weights, number * widest)
        parts["weights"] = 0 if "param" in parallel.offload and on_gpu else weights
        parts["gradients"] = gradients + number * min(trained, BUCKET)
        optimizer = trained * 4 * (2 + moments) // sharing
        parts["optimizer"] = 0 if "optimizer" in parallel.offload and on_gpu else optimizer
        stepped = 0
    tokens, apart = _micro_batch(config, size, row)
    layer = (24 + (2 if number == 2 else 0) - (8 if config.lora else 0)) * size.hidden
    layer += 7 * number * config.lora.rank if config.lora else 0
    attention = size.query_width + apart * 2 * (size.query_width + size.key_width)
    layer += int(number * (4 * size.intermediate + attention)) // parallel.tp
    if config.gradient_checkpointing:
        kept, holes = size.layers * 4 * size.hidden + 1.25 * layer, 2.4
    else:
        kept, holes = (size.layers + 0.25) * layer, 1.5
    parts["activations"] = int(tokens * (kept + 12 * size.hidden) * (1 if on_gpu else holes))
    if not is_classifier:
        head = 0 if config.lora else words * (8 + number)
        parts["logits"] = 12 * min(HEAD_CHUNK, tokens) * size.vocabulary + head
    if isinstance(config, PolicyConfig) and config.reference_model is not None:
        parts["reference"] = base * size.parameters + 4 * REFERENCE_CHUNK * size.vocabulary * 6
    over = parts["activations"] + parts.get("logits", 0)
    parts["step"] = max(0, stepped - over, merged - over)
    return Memory({**parts, "process": PROCESS}, parallel.processes)


def _has_score_head(config: TrainingConfig) -> bool:
    return isinstance(config, CriticConfig) or (isinstance(config, RewardConfig) and config.kind == "bradley_terry")


def trained_numbers(config: TrainingConfig, size: Size) -> int:
    """T: numbers that a training changes."""
    if config.lora is None:
        return size.trained(config.frozen)
    return _adapter_numbers(config, size) + (size.hidden if _has_score_head(config) else 0)


def _adapter_numbers(config: TrainingConfig, size: Size) -> int:
    """Numbers in all adapters; a target that is none of a Llama's layers counts as all of them."""
    if config.lora is None:
        return 0
    h, i, q, k = size.hidden, size.intermediate, size.query_width, size.key_width
    widths = {
        "q_proj": h + q, "k_proj": h + k, "v_proj": h + k, "o_proj": q + h,
        "gate_proj": h + i, "up_proj": h + i, "down_proj": i + h,
    }  # fmt: skip
    targets = set(config.lora.targets)
    chosen = widths.values() if targets - widths.keys() else [widths[name] for name in targets]
    return size.layers * config.lora.rank * sum(chosen)


def _micro_batch(config: TrainingConfig, size: Size, row: LongestRow | None) -> tuple[int, float]:
    """Tokens of the largest micro-batch in a process, and for each how many attention works on."""
    packs = config.packing != "padded" and (config.packing != "auto" or size.model_type in FLAT)
    shares = packs and config.packing != "flat"
    tokens, apart = config.micro_batch_tokens, PADDING_SHARE if packs else 1.0
    if row is not None:
        one = row.shared if shares else row.flat
        apart *= row.flat / one
        tokens = min(-(-config.global_batch // config.parallel.dp) * one, max(tokens, one))
    return -(-tokens // config.parallel.sp), apart


def _longest_row(config: TrainingConfig, graph: Graph) -> LongestRow | None:
    """The largest row that a training may meet, where its data tell; longer sequences than max_length are dropped."""
    limit = config.max_length
    experience = _experience(config)
    found: list[Answers] = []
    if isinstance(config, SftConfig):
        rows = rows_of(config.demonstrations, graph)
        longest = rows.longest_tokens if rows else limit
        return None if longest is None else LongestRow(0, min(longest, limit or longest), 1)
    if experience is not None:
        found = [answers for answers in [experience_of(experience, graph)] if answers]
    elif isinstance(config, PolicyConfig | RewardConfig):
        found = [pairs[1] for path in config.pairs if (pairs := pairs_of(path, graph))]
    sequences = found[0].k if experience and found else 2
    if not found:
        return LongestRow(0, limit, sequences) if limit else None
    if isinstance(config, RewardConfig) and config.kind == "pairwise":
        question = max(map(question_tokens, found))
        return LongestRow(min(question, limit or question), 1, sequences)
    answer = max(answers.longest_answer for answers in found)
    prompt = max(answers.longest_prompt for answers in found)
    if limit is not None:
        answer = min(answer, limit)
        prompt = min(prompt, limit - answer)
    return LongestRow(prompt, answer, sequences)


def generation_memory(config: GenerationConfig, size: Size, answers: Answers | None, *, on_gpu: bool) -> Memory:
    """Memory of one replica, on each of its t = tensor_parallel devices.

    Weights a·P / t. KV cache: on a GPU vLLM fills what memory_utilization leaves, and needs room for the longest
    sequence at least (2 · layers · k · a bytes a token, over t); on a CPU for max_num_seqs of them, between 64 MiB and
    4 GiB (generation/vllm_engine.py), or kv_cache_mib. transformers' cache grows to a batch of max_num_seqs, and for
    an instant twice, because its tensors are copied to grow. Logits of max_num_seqs positions, which the sampler holds
    in several copies, fp64 among them: 32 bytes each.
    """
    number = {"float32": 4, "bfloat16": 2, "float16": 2}.get(config.dtype, 2 if on_gpu else 4)
    batch, longest = config.max_num_seqs, size.context or 4096
    if answers is not None:
        batch, longest = min(batch, answers.count), answers.longest
        if config.shard_size is not None:
            batch = min(batch, config.shard_size * config.k)
    elif config.max_prompt_tokens is not None:
        longest = config.max_prompt_tokens + config.max_new_tokens
    token = size.cache_numbers * number
    devices = config.tensor_parallel
    if config.engine == "transformers":
        cache = 2 * batch * longest * token
    elif config.kv_cache_mib is not None:
        cache = config.kv_cache_mib << 20
    elif on_gpu:
        cache = longest * token // devices
    else:
        cache = min(max(config.max_num_seqs * -(-longest // 128) * 128 * token, 64 << 20), 4 << 30)
    parts = {
        "weights": size.parameters * number // devices,
        "KV cache": cache,
        "logits": 32 * batch * size.vocabulary,
        "process": PROCESS,
    }
    share = config.memory_utilization if on_gpu and config.engine == "vllm" else 1.0
    return Memory(parts, max(config.replicas, config.servers), share)


def question_tokens(answers: Answers) -> int:
    """Tokens of the longest question which of two answers is better."""
    return answers.longest + answers.longest_answer + TEMPLATE_TOKENS


def scoring_memory(config: ScoreConfig, size: Size, answers: Answers | None, *, on_gpu: bool) -> Memory:
    """Memory of one replica: weights a·P, and one layer's work on N = batch_tokens tokens without gradients.

    That is N · (16 h + a · (2 (q + k) + 3 i)); log-probabilities take up to 2^26 logits in three copies besides, and
    the kind pairwise those of the last token of each question, which has 64 tokens at least.
    """
    number = {"float32": 4, "bfloat16": 2}.get(config.dtype, 2 if on_gpu else 4)
    tokens = config.batch_tokens
    if answers is not None and config.kind == "pairwise":
        questions = answers.count * (config.opponents or max(1, answers.k - 1))
        tokens = min(tokens, questions * question_tokens(answers))
    elif answers is not None:
        tokens = min(tokens, answers.count * answers.longest)
    wide = size.query_width + size.key_width
    layer = 16 * size.hidden + number * (2 * wide + 3 * size.intermediate)
    parts = {"weights": size.parameters * number, "activations": tokens * layer}
    if config.kind == "logprobs":
        parts["logits"] = min(LOGITS_AT_ONCE, tokens * size.vocabulary) * (8 + number)
    if config.kind == "pairwise":
        parts["logits"] = -(-tokens // TEMPLATE_TOKENS) * size.vocabulary * (4 + number)
    return Memory({**parts, "process": PROCESS}, config.replicas)
