"""Estimates the memory and disk space of a training from configs and model sizes alone; no torch.

P is a model's number of parameters, T how many of them are trained, N the tokens of a batch, V the vocabulary size, h
the hidden size, i the width of the feed-forward layers, q and k those of queries and keys, a the bytes per number.
"""

from dataclasses import dataclass
from pathlib import Path

from contracts.architectures import FLAT
from contracts.model_size import Size
from contracts.outlook import PROCESS_BYTES, STAGE_BYTES, AnswerStats, Memory, Outlook
from training.config import TrainingConfig

HEAD_CHUNK = 2048
"""Positions whose logits exist at once in training (modeling/logprobs.py)."""
REFERENCE_CHUNK = 512
"""Positions whose logits exist at once in a reference model loaded with the policy (modeling/divergence.py)."""
PADDING_SHARE = 1.25
"""Ratio of padded to actual tokens in the groups that attention splits flat batches into (modeling/packing.py)."""
BUCKET = 500_000_000
"""Numbers in DeepSpeed's buffer for gradients that are being reduced (reduce_bucket_size)."""


@dataclass(frozen=True)
class RowShape:
    """The size of a row: one prompt with its answers, which are never split over micro-batches."""

    prompt: int
    """Tokens of the prompt."""
    answer: int
    """Tokens of each answer."""
    sequences: int
    """Number of answers."""

    @property
    def flat(self) -> int:
        """Tokens in flat packing, which repeats the prompt for each answer."""
        return self.sequences * (self.prompt + self.answer)

    @property
    def shared(self) -> int:
        """Tokens in shared packing, which has the prompt once."""
        return self.prompt + self.sequences * self.answer


def training_memory(
    config: TrainingConfig, size: Size, row: RowShape | None, *, on_gpu: bool, with_reference: bool = False
) -> Memory:
    """Estimate the memory of a training process.

    Args:
        config: the training.
        size: dimensions of the model; the head of a classifier is trained.
        row: the largest row, if known.
        on_gpu: whether it trains on a GPU.
        with_reference: whether a reference model is loaded with the policy.

    P and T count the process's own part of the model: all of it, or with pp and tp its share of the layers and, in the
    first and last stage, one matrix of the vocabulary. a is 2 under bf16, else 4.

    Without sharding every process holds fp32 weights (4 P), their gradients (4 T), AdamW's moments (8 T; SGD has
    none), under plain data parallelism DDP's buckets (4 T), and under bf16 autocast bf16 copies of the weights (2 P).

    With LoRA, T counts the adapters, r (in + out) for each adapted layer, and the head of a classifier. The base
    weights take a bytes each (a P) and have no copies; the adapters are fp32 (4 T), with copies, gradients and moments.

    fsdp2 divides these by n = dp · sp. While it computes, two layers and the vocabulary's matrices are unsharded, in a
    bytes per number; with pp the whole stage is, for a whole step, with fp32 gradients of all of it.

    With DeepSpeed: weights a (P + adapters), gradients a·T, and in fp32 the process's share of the master weights,
    moments and gradients of the optimizer step, (4 + 8 + 4) T / n. ZeRO-2 divides the gradients by n as well; ZeRO-3
    also the weights, of which two layers and the embedding are unsharded at a time. Gradients being reduced:
    a · min(T, 5e8). Offloaded parts take no GPU memory.

    Activations of a layer, per token: c h + (4 a·i + a·q + u · 2 a (q + k)) / tp bytes: the residual stream, norms and
    inputs of the projections (c: 24, and 2 more under bf16; 8 less with LoRA, which adds 7 a·r); the feed-forward part;
    attention's output; and its queries, outputs, keys and values, split into whole sequences. These have u tokens for
    each token of the batch (a row's tokens with the prompt repeated for each answer, over those of the row as packed),
    with up to a quarter of padding. Activations of all layers are kept until the backward pass; with
    gradient_checkpointing only the layers' inputs are (4 h), while one layer is recomputed. The backward pass needs
    another quarter of a layer; embedding and last norm need 12 h. Measured on Llama as the tensors that autograd saves;
    on a CPU times 1.5 (with checkpointing 2.4) for malloc's fragmentation.

    The tokens are those of one micro-batch: micro_batch_tokens (a shared prompt counts once), but at most the
    replica's part of a global batch and at least one row, divided by sp. With pp the first stage has pp micro-batches
    in flight, each in a pp-th of the layers.

    Logits exist for at most 2048 positions at once, as three fp32 tensors in the backward pass, in addition to the
    head's fp32 gradient (not with LoRA) and its copies (modeling/logprobs.py). Bradley-Terry reward models and critics
    have none. A reference model adds its weights, in the policy's number format, and six fp32 tensors of the logits of
    512 positions (modeling/divergence.py).

    Once activations and logits are freed, AdamW's step on a GPU needs 4 T / n for its denominators, and merging the
    adapters into the published weights needs a·P: what exceeds the activations and logits is counted as `step`.
    """
    number = bytes_per_number(config, on_gpu)
    parallel, is_classifier = config.parallel, size.classifier
    total, trained, adapters = size.parameters, trained_parameters(config, size), _adapter_parameters(config, size)
    moments = 2 if config.optimizer == "adamw" else 0
    matrix = size.vocabulary * size.hidden
    vocabulary_matrices = 1 if size.tied or is_classifier else 2
    own_matrices = vocabulary_matrices if parallel.pp == 1 else 1
    if parallel.pp > 1 or parallel.tp > 1:
        whole = (total - vocabulary_matrices * matrix) // (parallel.pp * parallel.tp) + own_matrices * matrix
        trained = trained // parallel.pp if config.lora else trained * whole // total
        total, adapters = whole, adapters // parallel.pp
    sharing = parallel.dp * parallel.sp
    largest_unsharded = 2 * (size.parameters // max(1, size.layers) // parallel.tp) + matrix
    base = number if config.lora else 4
    copies = 2 * (adapters if config.lora else total) if number == 2 else 0
    step_bytes = 4 * trained if on_gpu and moments else 0
    merge_bytes = 0
    parts: dict[str, int] = {}
    if parallel.zero == "fsdp2":
        computing = total if parallel.pp > 1 else min(total, largest_unsharded + (own_matrices - 1) * matrix)
        parts["weights"] = (base * total + 4 * adapters) // sharing + number * computing
        parts["gradients"] = 4 * trained // sharing + 4 * min(trained, computing)
        parts["optimizer"] = 4 * moments * trained // sharing
        step_bytes //= sharing
    elif parallel.zero == 0:
        parts["weights"] = base * total + 4 * adapters + copies
        parts["gradients"] = trained * (8 if sharing > 1 and not parallel.is_native else 4)
        parts["optimizer"] = trained * 4 * moments
        merge_bytes = number * (total - vocabulary_matrices * matrix) if config.lora else 0
    else:
        weights, gradients = (total + adapters) * number, trained * number
        if parallel.zero >= 2:
            gradients //= sharing
        if parallel.zero == 3:
            weights = weights // sharing + min(weights, number * largest_unsharded)
        parts["weights"] = 0 if "param" in parallel.offload and on_gpu else weights
        parts["gradients"] = gradients + number * min(trained, BUCKET)
        optimizer = trained * 4 * (2 + moments) // sharing
        parts["optimizer"] = 0 if "optimizer" in parallel.offload and on_gpu else optimizer
        step_bytes = 0
    tokens, expansion = _micro_batch_tokens(config, size, row)
    layer = (24 + (2 if number == 2 else 0) - (8 if config.lora else 0)) * size.hidden
    layer += 7 * number * config.lora.rank if config.lora else 0
    attention = size.query_width + expansion * 2 * (size.query_width + size.key_width)
    layer += int(number * (4 * size.intermediate + attention)) // parallel.tp
    if config.gradient_checkpointing:
        kept, fragmentation = size.layers * 4 * size.hidden + 1.25 * layer, 2.4
    else:
        kept, fragmentation = (size.layers + 0.25) * layer, 1.5
    parts["activations"] = int(tokens * (kept + 12 * size.hidden) * (1 if on_gpu else fragmentation))
    if not is_classifier:
        head = 0 if config.lora else matrix * (8 + number)
        parts["logits"] = 12 * min(HEAD_CHUNK, tokens) * size.vocabulary + head
    if with_reference:
        parts["reference"] = base * size.parameters + 4 * REFERENCE_CHUNK * size.vocabulary * 6
    freed = parts["activations"] + parts.get("logits", 0)
    parts["step"] = max(0, step_bytes - freed, merge_bytes - freed)
    return Memory({**parts, "process": PROCESS_BYTES}, parallel.processes)


def trained_parameters(config: TrainingConfig, size: Size) -> int:
    """T: the number of trained parameters."""
    if config.lora is None:
        return size.trained(config.frozen)
    return _adapter_parameters(config, size) + (size.hidden if size.classifier else 0)


def _adapter_parameters(config: TrainingConfig, size: Size) -> int:
    """Parameters of all adapters; a target that is not a layer of Llama is counted as all layers."""
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


def _micro_batch_tokens(config: TrainingConfig, size: Size, row: RowShape | None) -> tuple[int, float]:
    """Tokens of the largest micro-batch in a process, and attention's number of tokens for each of them."""
    packs = config.packing != "padded" and (config.packing != "auto" or size.model_type in FLAT)
    shares = packs and config.packing != "flat"
    tokens, expansion = config.micro_batch_tokens, PADDING_SHARE if packs else 1.0
    if row is not None:
        one = row.shared if shares else row.flat
        expansion *= row.flat / one
        tokens = min(-(-config.global_batch // config.parallel.dp) * one, max(tokens, one))
    return -(-tokens // config.parallel.sp), expansion


def longest_row_of(answers: list[AnswerStats], sequences: int, limit: int | None) -> RowShape | None:
    """The largest possible row of `sequences` answers to one prompt; sequences above `limit` tokens are dropped."""
    if not answers:
        return RowShape(0, limit, sequences) if limit else None
    answer = max(found.longest_answer for found in answers)
    prompt = max(found.longest_prompt for found in answers)
    if limit is not None:
        answer = min(answer, limit)
        prompt = min(prompt, limit - answer)
    return RowShape(prompt, answer, sequences)


def bytes_per_number(config: TrainingConfig, on_gpu: bool) -> int:
    """Bytes per number in computation and in the checkpoint: `auto` is bf16 on a GPU, fp32 on a CPU."""
    return 2 if config.dtype == "bfloat16" or (config.dtype == "auto" and on_gpu) else 4


def model_bytes(output: Path, outlook: Outlook) -> int | None:
    """Bytes of a model published in float32 with its tokenizer; None if its size is unknown."""
    size = outlook.size_of(output)
    return None if size is None else size.checkpoint_bytes(4) + STAGE_BYTES
