"""Estimates the times of stages from the operations and bytes of their models and a device's data sheet: a roofline.

A part of the work takes as long as its operations at an achievable share of peak compute, or as its bytes at an
achievable share of the bandwidth, whichever is longer (Williams, Waterman, Patterson 2009). Nothing here was measured
on the device, and contention is not included.

M is the number of parameters in the matrices of a model's layers, T the number of trained parameters, V the vocabulary
size, h the hidden size, q and k the widths of queries and keys, i that of the feed-forward layers, a the bytes of a
number.
"""

import math
from dataclasses import dataclass

from contracts.model_size import Size
from contracts.operations import Operations
from pipelines.planning.profiles.datasheets import DataSheet

COMPUTE_SHARE = 0.4
"""The share of peak compute that training reaches: 44 % to 52 % in Megatron-LM (arXiv 2104.04473, table 1), less in
small models."""
BANDWIDTH_SHARE = 0.6
"""The share of the memory bandwidth that decoding reaches."""
LINK_SHARE = 0.7
"""The share of the link bandwidth that collectives reach."""
DISPATCH_SECONDS = {True: 60e-6, False: 150e-6}
"""Launch overhead of each layer and pass, on a GPU and on a CPU: a dozen kernels of 5 us, or of 12 us."""
COLLECTIVE_SECONDS = 20e-6
"""Latency of each collective."""
OPTIMIZER_BYTES = 28
"""Bytes per parameter in an optimizer step: AdamW reads weight, gradient and two moments and writes three of them, in
fp32."""
START_SECONDS = {"generation": 15.0, "annotation": 5.0, "training": 5.0}
"""Starting the process of a stage and its imports, by package; light stages take LIGHT_START_SECONDS."""
LIGHT_START_SECONDS = 1.0
ENGINE_SECONDS = {True: 30.0, False: 5.0}
"""Building an engine in addition to reading its weights, on a GPU (with CUDA graphs) and on a CPU."""
HANDOFF_SECONDS = 0.5
"""Publishing small files."""
FIRST_SECONDS = 0.3
"""Minimum compute time of a stage with a model: its first passes, small files. From the CPU seconds of the quickstart's
reward model for 256 to 3072 answers (`pipeline profile list RUN --json`)."""
LIGHT_SECONDS, ROW_SECONDS = 0.2, 3e-5
"""Compute time of a light stage: a fixed part, and a part per row; from those of the quickstart's rules for 256 to 6144
answers."""


@dataclass(frozen=True)
class Costs:
    """Seconds of a stage by phase."""

    start: float
    load: float
    compute: float
    handoff: float


def matrix_parameters(size: Size) -> int:
    """M: parameters in the matrices that every token passes, without the vocabulary's: 2 h q + 2 h k + 3 h i per
    layer."""
    layer = 2 * size.hidden * (size.query_width + size.key_width) + 3 * size.hidden * size.intermediate
    return size.layers * layer


def forward_operations(size: Size, tokens: int, length: int, logits: int) -> float:
    """Operations of a forward pass: 2 M for each token, 2 V h for each position with logits, and 4 q for each layer and
    pair of tokens that attend to each other; a token attends to `length` / 2 on average (Kaplan et al. 2020, arXiv
    2001.08361)."""
    attention = 4 * size.layers * size.query_width * tokens * (length / 2)
    return 2.0 * matrix_parameters(size) * tokens + 2.0 * size.vocabulary * size.hidden * logits + attention


def compute_seconds(work: Operations, sheet: DataSheet) -> float:
    """Compute time of a stage."""
    if work.kind == "training":
        return FIRST_SECONDS + training_seconds(work, sheet)
    if work.kind == "sampling":
        return FIRST_SECONDS + prefill_seconds(work, sheet) + decode_seconds(work, sheet)
    return FIRST_SECONDS + scoring_seconds(work, sheet)


def _roofline(operations: float, bytes_moved: float, number: int, sheet: DataSheet) -> float:
    return max(operations / (COMPUTE_SHARE * sheet.rate(number)), bytes_moved / (BANDWIDTH_SHARE * sheet.bandwidth))


def _collective(bytes_moved: float, sheet: DataSheet, *, across_machines: bool = False) -> float:
    return bytes_moved / (LINK_SHARE * (sheet.network if across_machines else sheet.link)) + COLLECTIVE_SECONDS


def scoring_seconds(work: Operations, sheet: DataSheet) -> float:
    """Compute time of forward passes of `batch` tokens, divided over all copies; each pass reads the weights once."""
    size, copies = work.model, max(1, work.layout.dp)
    passes = math.ceil(work.tokens / max(1, work.batch) / copies)
    operations = forward_operations(size, work.tokens, work.length, work.logits) / copies
    bytes_moved = passes * size.parameters * work.number
    return (
        _roofline(operations, bytes_moved, work.number, sheet) + passes * size.layers * DISPATCH_SECONDS[sheet.is_gpu]
    )


def prefill_seconds(work: Operations, sheet: DataSheet) -> float:
    """Compute time of the prompts' forward passes in each copy, of up to 2048 tokens each."""
    size, layout = work.model, work.layout
    copies, parts = max(1, layout.dp), max(1, layout.tp)
    tokens = work.prompt_tokens / copies
    passes = math.ceil(tokens / 2048)
    operations = forward_operations(size, work.prompt_tokens, work.length, 0) / copies / parts
    bytes_moved = passes * size.parameters * work.number / parts
    seconds = (
        _roofline(operations, bytes_moved, work.number, sheet) + passes * size.layers * DISPATCH_SECONDS[sheet.is_gpu]
    )
    if parts > 1:
        seconds += passes * size.layers * 2 * _all_reduce(tokens / passes * size.hidden * work.number, parts, sheet)
    return seconds


def decode_seconds(work: Operations, sheet: DataSheet) -> float:
    """Compute time of decoding `batch` sequences at a time: each step reads the weights and the keys and values of all
    sequences, on average half of their final number."""
    size, layout = work.model, work.layout
    copies, parts = max(1, min(layout.dp, work.sequences)), max(1, layout.tp)  # copies do not share a sequence
    batch = max(1, work.batch)
    steps = math.ceil(work.answer_tokens / copies / batch)
    operations = forward_operations(size, batch, work.length, batch) / parts
    cache = batch * size.cache_elements * work.number * work.length / 2
    bytes_moved = (size.parameters * work.number + cache) / parts
    step = _roofline(operations, bytes_moved, work.number, sheet) + size.layers * DISPATCH_SECONDS[sheet.is_gpu]
    if parts > 1:
        step += size.layers * 2 * _all_reduce(batch * size.hidden * work.number, parts, sheet)
    return steps * step


def _all_reduce(bytes_moved: float, parts: int, sheet: DataSheet, *, across_machines: bool = False) -> float:
    """Time of a ring all-reduce: 2 (n - 1) / n of the bytes pass each process."""
    return _collective(2 * (parts - 1) / parts * bytes_moved, sheet, across_machines=across_machines)


def training_seconds(work: Operations, sheet: DataSheet) -> float:
    """Compute time of optimizer steps: forward and backward passes of micro-batches, gradient reduction, optimizer
    update.

    The backward pass takes twice the operations of the forward pass, or as many if few parameters are trained
    (adapters); activation recomputation takes one more forward pass. Tensor parallelism: four all-reduces per
    layer, of h a bytes for each token of the micro-batch, and two more with recomputation (Megatron-LM, arXiv
    1909.08053). Pipeline parallelism of p stages: (p - 1) / (m + p - 1) of the time is a bubble, with m micro-batches
    (GPipe, arXiv 1811.06965). Data parallelism: an all-reduce of 4 T bytes per step, or a T with ZeRO; ZeRO-3 and fsdp2
    also gather the weights in each pass (ZeRO, arXiv 1910.02054). Sequence parallelism: four exchanges of all tokens
    per layer and pass (DeepSpeed Ulysses, arXiv 2309.14509). Offload: optimizer states move to CPU memory and back over
    PCIe in every step, and offloaded weights in every pass.
    """
    size, layout, steps = work.model, work.layout, max(1, work.steps)
    dp, tp, pp, sp = (max(1, part) for part in (layout.dp, layout.tp, layout.pp, layout.sp))
    sharing = dp * sp
    across_machines = layout.nodes > 1 or layout.processes > sheet.devices
    tokens = work.passes * work.tokens / steps / dp / sp  # per step and process
    micro_batches = max(1, math.ceil(tokens * sp / max(1, work.batch)))
    trains_few = work.trained < size.parameters / 10
    factor = (2 if trains_few else 3) + work.recomputes
    logits = work.passes * work.logits / steps / dp / sp
    operations = (factor + work.forward_models) * forward_operations(size, 1, work.length, 0) * tokens
    operations += (factor + work.forward_models) * 2.0 * size.vocabulary * size.hidden * logits
    bytes_moved = micro_batches * (factor + work.forward_models) * size.parameters * work.number
    passes = micro_batches * (factor + work.forward_models)
    dispatch = passes * size.layers / pp * DISPATCH_SECONDS[sheet.is_gpu]
    compute = _roofline(operations, bytes_moved, work.number, sheet) / tp / pp + dispatch
    layers = size.layers / pp
    activations = tokens / micro_batches * size.hidden * work.number
    if tp > 1:
        compute += micro_batches * layers * (4 + 2 * work.recomputes) * _all_reduce(activations, tp, sheet)
    if sp > 1:
        compute += micro_batches * layers * factor * 4 * _collective(activations, sheet)
    if pp > 1:
        compute += micro_batches * 2 * _collective(activations, sheet, across_machines=across_machines)
        compute *= (micro_batches + pp - 1) / micro_batches
    trained = work.trained / tp / pp
    seconds = compute
    gathers = layout.zero in (3, "fsdp2")
    if sharing > 1:
        seconds += _all_reduce(
            (work.number if layout.zero else 4) * trained, sharing, sheet, across_machines=across_machines
        )
    if sharing > 1 and gathers:
        weights = size.parameters / tp / pp * work.number * (sharing - 1) / sharing
        seconds += micro_batches * (2 + work.recomputes) * _collective(weights, sheet, across_machines=across_machines)
    owned = trained / (sharing if layout.zero else 1)
    seconds += owned * OPTIMIZER_BYTES / (BANDWIDTH_SHARE * sheet.bandwidth)
    if "optimizer" in layout.offload:
        seconds += owned * (4 + work.number) / (LINK_SHARE * sheet.pcie)
    if "param" in layout.offload:
        seconds += (
            micro_batches * (2 + work.recomputes) * size.parameters * work.number / sharing / (LINK_SHARE * sheet.pcie)
        )
    return steps * seconds


def load_seconds(work: Operations, sheet: DataSheet) -> float:
    """Time to read the weights from disk and move them to the device, and for sampling to build the engine."""
    held = work.model.parameters * work.number / max(1, work.layout.tp) / max(1, work.layout.pp)
    seconds = (1 + work.forward_models) * (held / sheet.disk + held / sheet.pcie)
    return seconds + (ENGINE_SECONDS[sheet.is_gpu] if work.kind == "sampling" else 0.0)


def handoff_seconds(work: Operations, sheet: DataSheet) -> float:
    """Time to write the output; a training's weights are read again to verify them."""
    if work.kind != "training":
        return HANDOFF_SECONDS
    return HANDOFF_SECONDS + 2 * work.model.parameters * work.number / sheet.disk


def model_costs(work: Operations, package: str, sheet: DataSheet) -> Costs:
    """Times of a stage with a model from a cold start."""
    start = START_SECONDS.get(package, LIGHT_START_SECONDS)
    return Costs(start, load_seconds(work, sheet), compute_seconds(work, sheet), handoff_seconds(work, sheet))


def light_costs(rows: int, written: int, sheet: DataSheet) -> Costs:
    """Times of a stage without a model.

    Args:
        rows: rows that it processes.
        written: bytes of the model that it reads and the one that it makes, each; 0 if it makes none.
    """
    moving = written / sheet.disk
    return Costs(LIGHT_START_SECONDS, moving, LIGHT_SECONDS + rows * ROW_SECONDS, HANDOFF_SECONDS + moving)
