"""TRL's side of the DPO benchmark: trains with DPOTrainer on given pairs, one optimizer step per unit of work."""

import sys
from pathlib import Path
from typing import Any

from benchmarks import workload
from benchmarks.side import Side


def main(path: str) -> None:
    """Train until no more units are requested; `path` is a file written by `workload.write`."""
    side = Side()
    import tempfile

    import torch
    from datasets import Dataset
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast, TrainerCallback
    from trl import DPOConfig, DPOTrainer, __version__

    settings, shape, batches = workload.read(Path(path), workload.Pair)
    torch.set_num_threads(settings["threads"])
    micro_batch = settings["trl_pairs"]
    rows = [row for batch in batches for row in sorted(batch, key=_longest)]

    class Trainer(DPOTrainer):  # type: ignore[misc]
        """A trainer that uses the data as it is: it has token ids and reference values already."""

        def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
            return dataset

        def _precompute_ref_logps(self, dataset: Any, *_: Any, **__: Any) -> Any:
            return dataset

    class Units(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            done = state.global_step - 1
            losses = trainer.losses[-len(batches[done % len(batches)]) // micro_batch :]
            side.done(
                useful_tokens=sum(row.useful_tokens for row in batches[done % len(batches)]),
                loss=sum(losses) / len(losses),
                peak_device_memory_gib=torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None,
            )

    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(vocabulary, unk_token="<unk>")),
        pad_token="<pad>",
        eos_token="</s>",
    )
    with tempfile.TemporaryDirectory() as scratch:
        arguments = DPOConfig(
            output_dir=scratch,
            per_device_train_batch_size=micro_batch,
            gradient_accumulation_steps=len(batches[0]) // micro_batch,
            max_steps=1000,
            learning_rate=settings["learning_rate"],
            lr_scheduler_type="constant",
            weight_decay=settings["weight_decay"],
            optim={"adamw": "adamw_torch_fused", "sgd": "sgd"}[settings["optimizer"]],
            beta=settings["beta"],
            max_length=None,
            train_sampling_strategy="sequential",
            precompute_ref_log_probs=True,
            gradient_checkpointing=False,
            bf16=settings["device"] == "cuda",
            use_cpu=settings["device"] == "cpu",
            dataloader_num_workers=0,
            dataloader_pin_memory=False,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=0,
        )
        dataset = Dataset.from_list(
            [
                {
                    "prompt_ids": row.prompt,
                    "chosen_ids": row.chosen,
                    "rejected_ids": row.rejected,
                    "ref_chosen_logps": row.reference[0],
                    "ref_rejected_logps": row.reference[1],
                }
                for row in rows
            ]
        )
        with torch.device(settings["device"]):
            model = shape.causal(settings["seed"])
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=dataset,
            processing_class=tokenizer,
            callbacks=[Units()],
        )
        trainer.losses = []
        forward = side.timed("forward", trainer._compute_loss)

        def compute_loss(*args: Any, **kwargs: Any) -> Any:
            loss = forward(*args, **kwargs)
            trainer.losses.append(float(loss.detach()))
            return loss

        trainer._compute_loss = compute_loss
        trainer.accelerator.backward = side.timed("backward", trainer.accelerator.backward)
        trainer.create_optimizer()
        trainer.optimizer.step = side.timed("optimizer", trainer.optimizer.step)
        computed = sum(
            2 * micro_batch * max(_longest(row) for row in rows[start : start + micro_batch])
            for start in range(0, len(rows), micro_batch)
        )
        useful = sum(row.useful_tokens for row in rows)
        side.ready(version=__version__, pairs=micro_batch, padding=1 - useful / computed)
        trainer.train()


def _longest(row: workload.Pair) -> int:
    return len(row.prompt) + max(len(row.chosen), len(row.rejected))


if __name__ == "__main__":
    main(sys.argv[1])
