"""Checks the numbers and the speed of packed training on this GPU. Needs torch, transformers and accelerate.

    bash scripts/gpu-check.sh                       on one NVIDIA GPU, in less than 8 minutes
    bash scripts/gpu-check.sh --self-test           on a CPU, with a tiny model, to check this program itself

It prints one JSON object and writes it to benchmarks/results/NAME.json. The figures are explained in
benchmarks/README.md.
"""

import argparse
import gc
import importlib.metadata
import importlib.util
import json
import os
import re
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import workload
from benchmarks.side import Child
from modeling.attention import attention_on, use_packed_attention
from modeling.modules import SequenceScores, TokenLogprobs, TokenValues
from modeling.packing import Packed, Packing, pack
from modeling.rows import Response, Row, token_ids
from training.algorithm import Answers, Pairs, Samples
from training.algorithms import dpo, ppo
from training.algorithms.parts import clipped_value_loss

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"

PEAK_BF16 = (
    # FLOP per second of the tensor cores, without sparsity, from NVIDIA's data sheets. The first match counts.
    (r"H200|H100.*(SXM|HBM3)|GH200", 989e12),
    (r"H100 NVL", 835e12),
    (r"H100", 756e12),  # PCIe
    (r"B200", 2250e12),
    (r"A100|A800", 312e12),
    (r"L40S", 362e12),
    (r"L40", 181e12),
    (r"L4", 121e12),
    (r"A10G", 70e12),
    (r"A10", 125e12),
    (r"A6000", 155e12),
    (r"RTX 5090", 210e12),
    (r"RTX 4090", 165e12),
    (r"RTX 3090", 71e12),
)  # fmt: skip
"""Peak speeds by patterns of device names."""

SHAPES = {
    # The weights are random; the shapes are those of Llama 3.2, and of a similar model with half a billion weights.
    "3B": workload.Shape(28, 3072, 8192, 24, 8, 128256),
    "1B": workload.Shape(16, 2048, 8192, 32, 8, 128256),
    "0.5B": workload.Shape(24, 1280, 3456, 20, 5, 49152),
}
BYTES_PER_WEIGHT = 18
"""The sum of fp32 weights, gradients and two moments, and autocast's bf16 copy."""
BYTES_PER_ACTIVATION = 80
"""Approximate bytes per token, layer and hidden unit, without gradient checkpointing."""
LEAST_BUDGET, LARGEST_BUDGET = 4096, 16384
"""Bounds of the flat tokens per micro-batch."""

EXACT = 1e-4
"""The largest allowed difference between packed and padded log-probabilities in fp32 (nats)."""
BF16_FACTOR = 2.0
"""The allowed error of packed bf16, as a multiple of the error of transformers' own padded bf16, both against fp32."""
BF16_COSINE = 0.99
"""The smallest allowed cosine between the gradients in bf16 and in fp32."""


@dataclass(frozen=True)
class Plan:
    """The parameters of a real check, or of the self-test."""

    small: workload.Shape
    """The model with which numbers are compared."""
    large: str
    shape: workload.Shape
    """The model with which speed is measured; its name is `large`."""
    pairs: int
    """Pairs per optimizer step; PPO has twice as many rollouts."""
    prompt: int
    answer: int
    budget: int
    """Flat tokens per micro-batch."""
    steps: int
    seconds: float
    """A measurement ends after this time, or after `steps`."""
    trl_pairs: tuple[int, ...]
    """The micro-batch sizes with which TRL is measured; the best one counts."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Check, measure and write the report. Returns the exit code, which is 1 if a number is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--self-test", action="store_true", help="on the CPU, with a tiny model")
    parser.add_argument("--name", help="name of the result; by default the device's")
    parser.add_argument("--model", choices=sorted(SHAPES), help="by default the largest one that fits into memory")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder to write to")
    parser.add_argument("--no-trl", action="store_true", help="do not compare with TRL")
    options = parser.parse_args(arguments)
    if not options.self_test and not torch.cuda.is_available():
        print("error: no NVIDIA GPU is usable here; --self-test checks this program on a CPU", file=sys.stderr)
        return 2
    device = torch.device("cpu" if options.self_test else "cuda")
    start = time.monotonic()
    plan = self_test() if options.self_test else full_check(options.model)
    report: dict[str, Any] = {
        "command": shlex.join(["bash", "scripts/gpu-check.sh", *(sys.argv[1:] if arguments is None else arguments)]),
        "machine": machine(device),
        "correctness": correctness(plan, device),
    }
    report["passed"] = report["correctness"]["passed"]
    show("correctness", report["correctness"])
    report["model"] = {"size": plan.large, **asdict(plan.shape), "parameters": plan.shape.parameters}
    report["workload"] = {name: value for name, value in asdict(plan).items() if name not in ("small", "shape")}
    for name, measure in (("dpo", measure_dpo), ("ppo", measure_ppo)):
        report[name] = within_memory(measure, plan, device)
        show(name, report[name])
    report["scoring"] = within_memory(measure_scoring, plan, device)
    show("scoring", report["scoring"])
    report["trl_dpo"] = {"skipped": "--no-trl"} if options.no_trl else measure_trl(plan, device)
    if "tokens_per_second" in report["trl_dpo"]:
        report["dpo_vs_trl"] = round(report["dpo"]["tokens_per_second"] / report["trl_dpo"]["tokens_per_second"], 3)
    show("trl_dpo", report["trl_dpo"])
    report["seconds"] = round(time.monotonic() - start, 1)
    name = options.name or ("self-test" if options.self_test else file_name(report["machine"]["device"]))
    options.results.mkdir(parents=True, exist_ok=True)
    path = options.results / f"{name}.json"
    path.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps({**report, "written": str(path)}))
    return 0 if report["passed"] else 1


def self_test() -> Plan:
    """The smallest plan that exercises everything."""
    tiny = workload.Shape(2, 64, 128, 4, 2, 512)
    return Plan(tiny, "tiny", tiny, pairs=4, prompt=12, answer=12, budget=96, steps=2, seconds=10.0, trl_pairs=(2,))


def full_check(size: str | None) -> Plan:
    """A plan with the largest model whose training fits into free memory, and micro-batches that fill the rest."""
    free = 0.85 * torch.cuda.mem_get_info()[0]
    budgets = {
        name: int(free - BYTES_PER_WEIGHT * shape.parameters) // (BYTES_PER_ACTIVATION * shape.hidden * shape.layers)
        for name, shape in SHAPES.items()
    }
    size = size or next((name for name, budget in budgets.items() if budget >= LEAST_BUDGET), "0.5B")
    budget = min(max(budgets[size] // 1024 * 1024, 1024), LARGEST_BUDGET)
    small = workload.Shape(4, 1024, 2816, 16, 4, 32000)
    return Plan(
        small, size, SHAPES[size], pairs=16, prompt=384, answer=384, budget=budget, steps=6, seconds=40.0,
        trl_pairs=(2, 4),
    )  # fmt: skip


def within_memory(measure: Callable[..., dict[str, Any]], plan: Plan, device: torch.device) -> dict[str, Any]:
    """Measure, with smaller micro-batches after running out of memory."""
    while True:
        try:
            return {"micro_batch_tokens": plan.budget, **measure(plan, device)}
        except torch.OutOfMemoryError:
            if plan.budget < 1024:
                raise
            plan = replace(plan, budget=plan.budget // 2)


# Correctness


def correctness(plan: Plan, device: torch.device) -> dict[str, Any]:
    """Compare log-probabilities and gradients: packed with padded in fp32, and packed bf16 with fp32.

    The error of bf16 depends on the model, so it is compared with that of transformers' own padded forward.
    """
    torch.set_float32_matmul_precision("highest")  # no TF32
    made = workload.pairs(plan.small, count=6, prompt=48, answer=64, spread=0.6, seed=1)
    rows = [pair_row(number, pair) for number, pair in enumerate(made)]
    findings: dict[str, Any] = {}
    outputs: dict[str, tuple[Tensor, Tensor]] = {}
    for packing in ("shared", "flat", "padded"):
        for dtype in (torch.float32, torch.bfloat16):
            outputs[f"{packing}_{'bf16' if dtype == torch.bfloat16 else 'fp32'}"] = logprobs_and_gradient(
                plan, rows, packing, dtype, device
            )
    logprobs, gradient = outputs["padded_fp32"]
    scale = float(gradient.abs().max())
    for name in ("shared", "flat"):
        found, its_gradient = outputs[f"{name}_fp32"]
        findings[f"{name}_fp32"] = {
            "largest_logprob_difference": float((found - logprobs).abs().max()),
            "largest_gradient_difference": float((its_gradient - gradient).abs().max()) / scale,
        }
    for name in ("padded", "shared", "flat"):
        found, its_gradient = outputs[f"{name}_bf16"]
        findings[f"{name}_bf16"] = {
            "mean_logprob_difference": float((found - logprobs).abs().mean()),
            "gradient_cosine": float(torch.cosine_similarity(its_gradient, gradient, dim=0)),
        }
    allowed = BF16_FACTOR * findings["padded_bf16"]["mean_logprob_difference"]
    findings["limits"] = {"fp32": EXACT, "bf16_mean": allowed, "bf16_cosine": BF16_COSINE}
    findings["passed"] = all(
        findings[f"{name}_fp32"]["largest_logprob_difference"] < EXACT
        and findings[f"{name}_fp32"]["largest_gradient_difference"] < EXACT
        and findings[f"{name}_bf16"]["mean_logprob_difference"] <= allowed
        and findings[f"{name}_bf16"]["gradient_cosine"] > BF16_COSINE
        for name in ("shared", "flat")
    )
    return findings


def logprobs_and_gradient(
    plan: Plan, rows: list[Row], packing: Packing, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """The log-probabilities of all response tokens [N], and the gradient of their mean as one vector, both in fp64."""
    model = make(plan.small, TokenLogprobs, device, packing)
    batch = pack(rows, packing, device)
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        logprobs = model(batch)["logprobs"]
    logprobs.mean().backward()
    gradient = torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None])
    return logprobs.detach().double(), gradient.double()


# Speed


def measure_dpo(plan: Plan, device: torch.device) -> dict[str, Any]:
    """Measure optimizer steps of DPO on pairs, with each pair's prompt computed once."""
    trainer = Trainer(plan, TokenLogprobs, device)
    batches = [
        [
            pair_row(number, pair)
            for number, pair in enumerate(
                workload.pairs(
                    plan.shape, count=plan.pairs, prompt=plan.prompt, answer=plan.answer, spread=0.5, seed=seed
                )
            )
        ]
        for seed in range(plan.steps + 1)
    ]

    def loss(outputs: dict[str, Tensor], some: list[Row], batch: Packed, rows: list[Row]) -> Tensor:
        return dpo.loss(pairs_of(outputs, some, batch, len(rows)))["loss"]

    return trainer.measure(batches, loss)


def measure_ppo(plan: Plan, device: torch.device) -> dict[str, Any]:
    """Measure one epoch of PPO over rollouts: steps of the actor, then of the critic, which is a separate model."""
    rows = [
        [
            rollout_row(number, rollout)
            for number, rollout in enumerate(
                workload.rollouts(
                    plan.shape, count=2 * plan.pairs, prompt=plan.prompt, answer=plan.answer, spread=0.5, seed=seed
                )
            )
        ]
        for seed in range(plan.steps + 1)
    ]

    def actor_loss(outputs: dict[str, Tensor], some: list[Row], batch: Packed, rows: list[Row]) -> Tensor:
        return ppo.loss(samples_of(outputs, some, batch, rows))["loss"]

    def critic_loss(outputs: dict[str, Tensor], some: list[Row], batch: Packed, rows: list[Row]) -> Tensor:
        old, returns = column(some, "values", batch), column(some, "returns", batch)
        total = sum(row.response_tokens for row in rows)
        return clipped_value_loss(outputs["values"], old, returns, 0.2).sum() / total

    def wrap(model: Any) -> TokenLogprobs:
        return TokenLogprobs(model, entropy=True)

    found: dict[str, Any] = {"actor": Trainer(plan, wrap, device).measure(rows, actor_loss)}
    found["critic"] = Trainer(plan, TokenValues, device).measure(rows, critic_loss)
    seconds = sum(found[name]["seconds_per_step"] for name in ("actor", "critic"))
    found["tokens_per_second"] = round(found["actor"]["useful_tokens_per_step"] / seconds, 1)
    return found


ANSWERS = 4
"""Answers per prompt in `measure_scoring`."""


@torch.inference_mode()
def measure_scoring(plan: Plan, device: torch.device) -> dict[str, Any]:
    """Measure a reward model in bf16: in flat batches with each prompt computed once, and one conversation at a time,
    like a transformers pipeline with batch size 1."""
    gc.collect()
    made = workload.rollouts(
        plan.shape, count=4 * ANSWERS * plan.pairs, prompt=plan.prompt, answer=plan.answer, spread=0.5, seed=0
    )
    groups = [made[first : first + ANSWERS] for first in range(0, len(made), ANSWERS)]
    rows = [
        Row(str(number), token_ids(of[0].prompt), tuple(Response(token_ids(each.response)) for each in of))
        for number, of in enumerate(groups)
    ]
    flat = make(plan.shape, SequenceScores, device, "shared").to(torch.bfloat16)
    alone = make(plan.shape, SequenceScores, device, "padded").to(torch.bfloat16)

    def shared(some: list[Row]) -> list[Tensor]:
        batches = micro_batches(some, plan.budget)
        return [flat(pack(batch, "shared", device, attend_once=True))["scores"] for batch in batches]

    def single(some: list[Row]) -> list[Tensor]:
        return [
            alone(pack([Row("", row.prompt, (response,))], "padded", device))["scores"].cpu()
            for row in some
            for response in row.responses
        ]

    found: dict[str, Any] = {"attention": attention_on(device, torch.bfloat16)}
    for name, score in (("shared", shared), ("batch_1", single)):
        score(rows[:1])
        count, seconds = 0, 0.0
        while count < len(rows) and seconds < plan.seconds / 4:
            some = rows[count : count + plan.pairs]
            start = time.perf_counter()
            torch.cat(score(some)).cpu()
            seconds += time.perf_counter() - start
            count += len(some)
        found[name] = {
            "tokens_per_second": round(sum(row.tokens for row in rows[:count]) / seconds, 1),
            "answers": sum(len(row.responses) for row in rows[:count]),
        }
    found["ratio"] = round(found["shared"]["tokens_per_second"] / found["batch_1"]["tokens_per_second"], 3)
    return found


class Trainer:
    """A model with AdamW, whose optimizer steps are measured."""

    def __init__(self, plan: Plan, wrap: Callable[[Any], nn.Module], device: torch.device) -> None:
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        self.plan = plan
        self.device = device
        self.module = make(plan.shape, wrap, device, "shared")
        self.attention = attention_on(device, torch.bfloat16)
        self.scores_tokens = isinstance(self.module, TokenLogprobs)
        self.optimizer = torch.optim.AdamW(self.module.parameters(), lr=1e-6, fused=device.type == "cuda")

    def measure(self, batches: list[list[Row]], loss: Callable[..., Tensor]) -> dict[str, Any]:
        """Run one warm-up step, then measure as many steps as there is time for."""
        self._step(batches[0], loss)
        done: list[list[Row]] = []
        losses: list[float] = []
        self._synchronize()
        start = time.perf_counter()
        for rows in batches[1:]:
            losses.append(self._step(rows, loss))
            self._synchronize()
            done.append(rows)
            if time.perf_counter() - start > self.plan.seconds:
                break
        seconds = time.perf_counter() - start
        if not all(map(torch.isfinite, map(torch.tensor, losses))):
            raise RuntimeError(f"losses are not finite: {losses}")
        useful = sum(row.tokens for rows in done for row in rows)
        work = sum(flops(self.plan.shape, rows, self.scores_tokens) for rows in done)
        peak = peak_flops(self.device)
        return {
            "steps": len(done),
            "seconds_per_step": round(seconds / len(done), 4),
            "useful_tokens_per_step": round(useful / len(done)),
            "tokens_per_second": round(useful / seconds, 1),
            "flops_per_second": work / seconds,
            "model_flops_utilisation": None if peak is None else round(work / seconds / peak, 4),
            "peak_memory_gib": peak_memory(self.device),
            "attention": self.attention,
            "losses": [round(value, 5) for value in losses],
        }

    def _step(self, rows: list[Row], loss: Callable[..., Tensor]) -> float:
        total = 0.0
        for some in micro_batches(rows, self.plan.budget):
            batch = pack(some, "shared", self.device)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
                outputs = self.module(batch)
            share = loss({name: value.float() for name, value in outputs.items()}, some, batch, rows)
            share.backward()
            total += float(share.detach())
        nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return total

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def measure_trl(plan: Plan, device: torch.device) -> dict[str, Any]:
    """Measure TRL's DPOTrainer on the same pairs and model, in its own process, with the best of several micro-batch
    sizes."""
    missing = [name for name in ("trl", "datasets") if importlib.util.find_spec(name) is None]
    if missing:
        return {"skipped": f"{' and '.join(missing)} not installed"}
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    batches = [
        workload.pairs(plan.shape, count=plan.pairs, prompt=plan.prompt, answer=plan.answer, spread=0.5, seed=seed)
        for seed in range(plan.steps + 1)
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false"}
    tried: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for count in plan.trl_pairs:
            settings = {
                "seed": 0, "threads": torch.get_num_threads(), "device": device.type, "optimizer": "adamw",
                "learning_rate": 1e-6, "weight_decay": 0.0, "beta": 0.1, "trl_pairs": count,
            }  # fmt: skip
            path = Path(scratch, f"{count}.json")
            workload.write(path, settings, plan.shape, list(batches))
            try:
                tried[str(count)] = run_trl(path, environment, plan)
            except RuntimeError as error:  # for example, out of memory
                tried[str(count)] = {"failed": str(error)[-500:]}
    fine = {count: entry for count, entry in tried.items() if "tokens_per_second" in entry}
    if not fine:
        return {"failed": tried}
    best = max(fine, key=lambda count: float(fine[count]["tokens_per_second"]))
    return {**fine[best], "pairs_per_micro_batch": int(best), "tried": tried}


def run_trl(path: Path, environment: dict[str, str], plan: Plan) -> dict[str, Any]:
    """Run one warm-up step of TRL, then measure its steps."""
    child = Child(sys.executable, "trl_dpo", path, environment)
    try:
        child.unit()
        lines: list[dict[str, Any]] = []
        while len(lines) < plan.steps and sum(line["seconds"] for line in lines) < plan.seconds:
            lines.append(child.unit())
    finally:
        child.close()
    seconds = sum(line["seconds"] for line in lines)
    return {
        **child.facts,
        "steps": len(lines),
        "seconds_per_step": round(seconds / len(lines), 4),
        "tokens_per_second": round(sum(line["useful_tokens"] for line in lines) / seconds, 1),
        "peak_memory_gib": lines[-1].get("peak_device_memory_gib"),
    }


# Inputs of the algorithms


def pair_row(number: int, pair: workload.Pair) -> Row:
    """The row of a pair with its reference values."""
    answers = zip((pair.chosen, pair.rejected), pair.reference, strict=True)
    responses = tuple(Response(token_ids(ids), {"reference": value}) for ids, value in answers)
    return Row(str(number), token_ids(pair.prompt), responses)


def rollout_row(number: int, rollout: workload.Rollout) -> Row:
    """The row of a sample with random experience."""
    generator = torch.Generator().manual_seed(number)
    size = len(rollout.response)
    tokens = {name: torch.randn(size, generator=generator).numpy() for name in ("advantages", "values", "returns")}
    return Row(str(number), token_ids(rollout.prompt), (Response(token_ids(rollout.response), {}, tokens),))


def pairs_of(outputs: dict[str, Tensor], rows: list[Row], batch: Packed, total: int) -> Pairs:
    """The loss inputs of a micro-batch of pairs; `total` is the number of pairs of the step."""
    owners = torch.repeat_interleave(torch.arange(len(batch.lengths), device=batch.lengths.device), batch.lengths)
    sums = outputs["logprobs"].new_zeros(len(batch.lengths)).index_add(0, owners, outputs["logprobs"])
    reference = torch.tensor([response.numbers["reference"] for row in rows for response in row.responses])
    reference = reference.to(sums)
    sides = [
        Answers(
            logp=sums[side::2],
            length=batch.lengths[side::2].to(sums.dtype),
            score=torch.zeros_like(sums[side::2]),
            reference_logp=reference[side::2],
        )
        for side in (0, 1)
    ]
    return Pairs(
        chosen=sides[0],
        rejected=sides[1],
        weights=torch.ones_like(sums[::2]),
        total=total,
        chosen_tokens=sum(len(row.responses[0].ids) for row in rows),
    )


def samples_of(outputs: dict[str, Tensor], rows: list[Row], batch: Packed, step: list[Row]) -> Samples:
    """The loss inputs of a micro-batch of rollouts; the old log-probabilities are the current ones."""
    logprobs = outputs["logprobs"]
    return Samples(
        logprobs=logprobs,
        entropy=outputs["entropy"],
        proximal=logprobs.detach(),
        behaviour=logprobs.detach(),
        advantages=column(rows, "advantages", batch),
        lengths=batch.lengths,
        weights=torch.ones(len(rows), device=logprobs.device),
        total=len(step),
        total_tokens=sum(row.response_tokens for row in step),
    )


def column(rows: list[Row], name: str, batch: Packed) -> Tensor:
    """The values of a per-token input for all response tokens, [N]."""
    values = [torch.from_numpy(response.tokens[name]) for row in rows for response in row.responses]
    return torch.cat(values).to(batch.lengths.device)


# Arithmetic


def flops(shape: workload.Shape, rows: list[Row], scores_tokens: bool) -> float:
    """The floating-point operations of a step on these rows, forward and backward, without any recomputation.

    3 (2 B T + 2 H N + 2 L A sum n^2): B weights of the layers, T tokens with each prompt once, H weights of the LM
    head (0 for a critic), N response tokens, L layers, A heads times head size, n the length of a whole sequence,
    for which causal attention takes 4 n^2 A / 2. Recomputation, padding and the optimizer are not counted.
    """
    tokens = sum(len(row.prompt) + row.response_tokens for row in rows)
    responses = sum(row.response_tokens for row in rows)
    squares = sum((len(row.prompt) + len(answer.ids)) ** 2 for row in rows for answer in row.responses)
    head = shape.hidden * shape.vocabulary if scores_tokens else shape.hidden
    return 3.0 * (
        2 * shape.layers * shape.layer_weights * tokens
        + 2 * head * responses
        + 2 * shape.layers * shape.hidden * squares
    )


def peak_flops(device: torch.device) -> float | None:
    """The peak bf16 speed of the GPU; None if it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name()
    return next((peak for pattern, peak in PEAK_BF16 if re.search(pattern, name)), None)


def peak_memory(device: torch.device) -> float | None:
    """The peak GiB of tensors since the model was created."""
    return round(torch.cuda.max_memory_allocated() / 2**30, 2) if device.type == "cuda" else None


def micro_batches(rows: list[Row], budget: int) -> list[list[Row]]:
    """Group rows by descending size into micro-batches of up to `budget` flat tokens."""
    made: list[list[Row]] = []
    left = 0
    for row in sorted(rows, key=lambda row: -(len(row.prompt) + row.response_tokens)):
        size = len(row.prompt) + row.response_tokens
        if size > left:
            made.append([])
            left = budget
        made[-1].append(row)
        left -= size
    return made


def make(shape: workload.Shape, wrap: Callable[[Any], Any], device: torch.device, packing: Packing) -> Any:
    """Create a model with random fp32 weights on the device, with packed attention unless `packing` is `padded`."""
    with torch.device(device):
        model = shape.classifier(0) if wrap in (TokenValues, SequenceScores) else shape.causal(0)
    model.eval()
    if packing != "padded":
        use_packed_attention(model)
    return wrap(model)


def machine(device: torch.device) -> dict[str, Any]:
    """The device and the library versions."""
    versions = {}
    for name in ("torch", "transformers", "accelerate", "trl", "flash_attn"):
        if importlib.util.find_spec(name) is not None:
            versions[name] = importlib.metadata.version(name)
    if device.type == "cpu":
        return {"device": "CPU", "versions": versions}
    return {
        "device": torch.cuda.get_device_name(),
        "memory_gib": round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1),
        "peak_bf16_flops": peak_flops(device),
        "versions": versions,
    }


def file_name(text: str) -> str:
    """Turn a text into a file name."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def show(name: str, found: dict[str, Any]) -> None:
    """Print an intermediate result."""
    print(f"{name}: {json.dumps(found)}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
