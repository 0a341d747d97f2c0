"""TRL's side of the PPO benchmark, with TRL 1.12, its last version with PPO: one batch of rollouts per unit of work.

Sampling is replaced by the given answers and their logits, and its time is not counted, because in Ratchet another
stage samples. The reward model is not counted either. The scoring of reference and critic and the epochs of updates are
counted.
"""

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
    from trl import __version__
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    settings, shape, batches = workload.read(Path(path), workload.Rollout)
    torch.set_num_threads(settings["threads"])
    size = len(batches[0])
    micro_batch = settings["trl_rollouts"]
    policy, critic = shape.causal(settings["seed"]), shape.classifier(settings["seed"] + 1)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel({"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3}, unk_token="<unk>")),
        pad_token="<pad>",
        eos_token="</s>",
        padding_side="left",
    )
    turn = iter(batch for _ in iter(int, 1) for batch in batches)
    current: list[workload.Rollout] = []

    class Units(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            line = state.log_history[-1]
            side.done(
                useful_tokens=sum(row.useful_tokens for row in current),
                policy_loss=line["loss/policy_avg"],
                value_loss=line["loss/value_avg"],
                entropy=line["objective/entropy"],
            )

    @torch.no_grad()
    def given(model: Any, queries: Any, *_: Any) -> tuple[Any, Any]:
        """The answers of a batch, padded on the right, and the logits that they were sampled with."""
        longest = max(len(row.response) for row in current)
        responses = torch.tensor([row.response + [0] * (longest - len(row.response)) for row in current])
        tokens = torch.cat([queries, responses.to(queries.device)], 1)
        logits = [
            ppo_trainer.forward(model, row, 0).logits[:, queries.shape[1] - 1 : -1]
            for row in tokens.split(settings["trl_rollouts"])
        ]
        return tokens, torch.cat(logits) / (1.0 + 1e-7)

    def collate(_: Any) -> Any:
        """Pad the prompts of the next batch on the left, like TRL's collator, regardless of the rows that the loader
        drew."""
        current[:] = sorted(next(turn), key=lambda row: len(row.prompt) + len(row.response))
        return tokenizer.pad([{"input_ids": row.prompt} for row in current], return_tensors="pt")

    with tempfile.TemporaryDirectory() as scratch:
        arguments = PPOConfig(
            output_dir=scratch,
            per_device_train_batch_size=micro_batch,
            gradient_accumulation_steps=size // micro_batch,
            num_mini_batches=1,
            num_ppo_epochs=settings["ppo_epochs"],
            local_rollout_forward_batch_size=settings["trl_rollouts"],
            total_episodes=1000 * size,
            num_sample_generations=0,
            stop_token="eos",
            temperature=1.0,
            learning_rate=settings["learning_rate"],
            lr_scheduler_type="constant",
            weight_decay=settings["weight_decay"],
            optim={"adamw": "adamw_torch_fused", "sgd": "sgd"}[settings["optimizer"]],
            gradient_checkpointing=False,
            bf16=settings["device"] == "cuda",
            use_cpu=settings["device"] == "cpu",
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=0,
        )
        trainer = PPOTrainer(
            args=arguments,
            processing_class=tokenizer,
            model=policy,
            ref_model=shape.causal(settings["seed"]),
            reward_model=shape.classifier(settings["seed"] + 2),
            value_model=critic,
            train_dataset=Dataset.from_dict({"input_ids": [[1]] * size}),
            eval_dataset=Dataset.from_dict({"input_ids": [[1]]}),
            data_collator=collate,
            callbacks=[Units()],
        )
        score = ppo_trainer.get_reward

        def get_reward(model: Any, *args: Any) -> Any:
            counted = model is not trainer.reward_model
            return (side.timed("values", score) if counted else side.exclude(score))(model, *args)

        forward = ppo_trainer.forward

        def timed_forward(model: Any, *args: Any) -> Any:
            phase = "reference" if model is trainer.ref_model else "forward"
            return side.timed(phase, forward)(model, *args)

        ppo_trainer.batch_generation = side.exclude(given)
        ppo_trainer.get_reward = get_reward
        ppo_trainer.forward = timed_forward
        trainer.accelerator.backward = side.timed("backward", trainer.accelerator.backward)
        trainer.optimizer.step = side.timed("optimizer", trainer.optimizer.step)
        side.ready(version=__version__, rollouts=micro_batch)
        trainer.train()


if __name__ == "__main__":
    main(sys.argv[1])
