"""Maps config keys of TRL, transformers, PEFT, accelerate, OpenRLHF and verl to those of Ratchet.

The message for an unknown key uses this table before it suggests keys with a similar spelling. docs/coming-from-trl.md
shows the table, which `python -m contracts.other_names` prints.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Alias:
    """The names of one setting in several tools."""

    trl: str
    """Names in TRL, transformers' TrainingArguments, PEFT or accelerate, separated by spaces."""
    others: str
    """Names in OpenRLHF and verl, separated by spaces; nested names are shortened to an unambiguous end."""
    ours: str
    """Keys of a run's config, separated by spaces; empty if there is no such key."""
    note: str
    """Sentences on what to do, or what is different."""

    @property
    def names(self) -> list[str]:
        """All names of the other tools."""
        return f"{self.trl} {self.others}".split()


TABLE = (
    # The algorithm.
    Alias("beta", "kl_loss_coef", "training.settings.beta", "Settings of the algorithm are in training.settings."),
    Alias("loss_type advantage_estimator", "adv_estimator policy_loss_type", "training.algorithm",
          "Each loss is an algorithm of its own: dpo, ipo, hinge, simpo, kto, grpo, dr_grpo, ppo; docs/algorithms.md."),
    Alias("label_smoothing", "", "training.settings.label_smoothing", "For dpo, cpo, exo and robust."),
    Alias("epsilon cliprange clip_range", "eps_clip clip_ratio clip_ratio_low eps_clip_low",
          "training.settings.clip", ""),
    Alias("epsilon_high", "eps_clip_high clip_ratio_high", "training.settings.clip_high", "For grpo and dr_grpo."),
    Alias("cliprange_value", "value_clip cliprange_value critic.cliprange_value", "critic.clip",
          "With training.value_head: training.settings.value_clip."),
    Alias("vf_coef", "", "training.settings.value_coefficient", "For a policy with training.value_head."),
    Alias("gamma", "algorithm.gamma", "training.settings.gamma", ""),
    Alias("lam", "lambd algorithm.lam", "training.settings.lam", ""),
    Alias("entropy_coef", "entropy_coeff entropy_loss_coef", "training.settings.entropy_coefficient", ""),
    Alias("whiten_rewards whiten_advantages scale_rewards", "normalize_reward norm_adv_by_std_in_grpo",
          "training.settings.whiten", "For ppo; grpo divides by the standard deviation, dr_grpo does not."),
    Alias("rpo_alpha sft_weight", "nll_loss_coef", "training.nll_coefficient", ""),
    Alias("kl_coef init_kl_coef", "kl_ctrl.kl_coef", "experience.kl_coefficient",
          "Weight of the KL penalty in the reward."),
    Alias("target_kl target", "kl_target kl_ctrl.target_kl", "experience.kl_target", ""),
    Alias("horizon", "kl_horizon kl_ctrl.horizon", "experience.kl_horizon", ""),
    Alias("ref_model ref_model_path reference_model model_init_kwargs sync_ref_model", "ref_pretrain ref.model.path",
          "reference", "initial, previous or ema: the reference is a policy of the run."),
    Alias("precompute_ref_log_probs precompute_ref_batch_size reference_free", "", "",
          "A separate stage computes the reference log-probabilities once; algorithms without a reference (simpo, "
          "orpo, cpo) do not need them. Leave it out."),
    Alias("ref_model_mixup_alpha", "ema_beta", "ema_decay", "With reference=ema."),
    Alias("ld_alpha use_weighting f_divergence_type discopop_tau simpo_gamma cpo_alpha", "", "training.algorithm",
          "Each of these is an algorithm or a setting of one: docs/algorithms.md."),
    Alias("vllm_importance_sampling_mode vllm_importance_sampling_correction",
          "rollout_is enable_vllm_is_correction", "training.correction",
          "{level: token, treatment: truncate, high: 2}; docs/lag.md."),
    Alias("vllm_importance_sampling_clip_max vllm_importance_sampling_cap",
          "rollout_is_threshold tis_imp_ratio_cap vllm_is_truncated_threshold",
          "training.correction.high", ""),
    Alias("vllm_importance_sampling_clip_min", "", "training.correction.low", ""),
    Alias("max_staleness", "staleness_threshold async_queue_size", "lag",
          "The exact number of iterations by which the policy that samples is behind."),
    Alias("steps_per_generation num_iterations num_ppo_epochs ppo_epochs num_mini_batches", "max_epochs ppo_epochs",
          "training.epochs", "Number of passes over the data of an iteration."),
    # The optimizer and its schedule.
    Alias("num_train_epochs", "", "training.epochs",
          "Number of passes over one iteration's data; `iterations` is the number of iterations."),
    Alias("total_episodes num_outer_iterations", "num_episodes total_epochs total_training_steps", "iterations",
          "Each iteration has prompts.per_iteration prompts."),
    Alias("per_device_train_batch_size", "micro_train_batch_size ppo_micro_batch_size_per_gpu ppo_micro_batch_size",
          "training.micro_batch_tokens", "Counted in tokens, and does not change results; training.global_batch is "
          "the number of rows per optimizer step."),
    Alias("gradient_accumulation_steps", "", "training.global_batch",
          "The number of rows per optimizer step, per_device_train_batch_size * gradient_accumulation_steps * "
          "processes; accumulation is derived from it."),
    Alias("train_batch_size global_batch_size", "train_batch_size ppo_mini_batch_size", "training.global_batch", ""),
    Alias("lr", "actor_learning_rate actor.optim.lr optim.lr", "training.learning_rate", ""),
    Alias("critic_lr", "critic_learning_rate critic.optim.lr", "critic.learning_rate", ""),
    Alias("lr_scheduler_type lr_scheduler_kwargs", "lr_scheduler warmup_style", "training.schedule",
          "cosine, linear or constant."),
    Alias("warmup_steps", "lr_warmup_ratio lr_warmup_steps lr_warmup_steps_ratio", "training.warmup_ratio",
          "As a share of the steps."),
    Alias("optim", "", "training.optimizer", "adamw or sgd; there are no 8-bit optimizers."),
    Alias("adam_epsilon", "", "", "It is 1e-8. Leave it out."),
    Alias("gradient_clipping", "max_norm grad_clip", "training.max_grad_norm", ""),
    Alias("gradient_checkpointing_kwargs", "enable_gradient_checkpointing", "training.gradient_checkpointing", ""),
    Alias("max_seq_length max_seq_len", "max_len max_token_len_per_gpu", "training.max_length",
          "Longer sequences are dropped and counted, never truncated."),
    Alias("packing_strategy padding_free", "packing_samples use_remove_padding", "training.packing",
          "auto packs if the model supports it."),
    Alias("dropout lora_dropout disable_dropout", "", "", "Dropout is not supported. Leave it out."),
    Alias("freeze_layers modules_to_freeze", "freezing_actor_steps", "training.frozen", ""),
    Alias("data_seed full_determinism", "", "seed",
          "All seeds of a run are derived from it; on CPUs, runs are bitwise reproducible."),
    # Number formats, memory, processes.
    Alias("bf16 fp16 tf32 torch_dtype mixed_precision model_dtype", "param_dtype", "training.dtype",
          "auto, float32 or bfloat16; generation and each scorer have a dtype of their own."),
    Alias("load_in_4bit load_in_8bit quantization_config bnb_4bit_quant_type bnb_4bit_compute_dtype use_bnb",
          "", "", "Quantised training is not supported. Adapters (training.lora={rank: 16}), training.parallel.zero "
          "and training.parallel.offload save memory."),
    Alias("deepspeed deepspeed_config zero_stage fsdp fsdp_config fsdp_transformer_layer_cls_to_wrap "
          "accelerate_config distributed_type", "zero_stage fsdp_config.fsdp_size strategy", "training.parallel.zero",
          "1, 2, 3 or fsdp2. training.parallel=FILE reads it from an accelerate or DeepSpeed file."),
    Alias("offload_optimizer_device offload_param_device", "adam_offload param_offload optimizer_offload",
          "training.parallel.offload", "[optimizer], [optimizer, param]."),
    Alias("num_processes nproc_per_node", "n_gpus_per_node actor_num_gpus_per_node", "training.parallel.dp", ""),
    Alias("num_machines nnodes", "trainer.nnodes actor_num_nodes", "training.parallel.nodes",
          "On Slurm: executor.stages.training.nodes."),
    Alias("context_parallel_size sequence_parallel_size cp_size", "ring_attn_size ulysses_sequence_parallel_size",
          "training.parallel.sp", ""),
    Alias("attn_implementation use_flash_attention_2", "flash_attn", "training.packing",
          "The attention implementation is chosen automatically; packing is the layout of batches."),
    Alias("use_liger_kernel use_liger_loss torch_compile", "use_liger", "",
          "The LM head is always computed in chunks, so logits take little memory. Leave it out."),
    Alias("trust_remote_code", "", "",
          "Code from model repositories is never run. Use an architecture of transformers."),
    # Adapters.
    Alias("use_peft peft_config", "", "training.lora", "{rank: 16, alpha: 32}."),
    Alias("r lora_r lora_rank", "", "training.lora.rank", ""),
    Alias("lora_alpha", "", "training.lora.alpha", ""),
    Alias("target_modules lora_target_modules", "", "training.lora.targets", ""),
    Alias("task_type lora_task_type bias modules_to_save lora_modules_to_save use_rslora use_dora", "", "",
          "Adapters are plain LoRA, merged when they are published. Leave it out."),
    Alias("adapter_name_or_path adapter_path peft_model_id", "lora_path", "policy",
          "Merge it first: `python -m training merge model=BASE adapter=DIRECTORY output=MERGED`."),
    # Sampling.
    Alias("num_generations num_return_sequences", "n_samples_per_prompt rollout.n", "generation.k",
          "Number of answers per prompt."),
    Alias("temperature", "", "generation.temperatures",
          "A list: [0.7], or several, each for an equal share of the answers."),
    Alias("max_completion_length max_new_tokens response_length max_tokens",
          "generate_max_len max_response_length", "generation.max_new_tokens", ""),
    Alias("max_prompt_length", "prompt_max_len", "generation.max_prompt_tokens", "Longer prompts are dropped."),
    Alias("use_vllm vllm_mode", "rollout.name", "generation.engine", "vllm (the default) or transformers."),
    Alias("vllm_gpu_memory_utilization gpu_memory_utilization", "rollout.gpu_memory_utilization",
          "generation.memory_utilization", ""),
    Alias("vllm_tensor_parallel_size", "tensor_model_parallel_size", "generation.tensor_parallel", ""),
    Alias("vllm_server_host vllm_server_port vllm_server_base_url", "vllm_num_engines", "generation.replicas",
          "The stage starts the engines, one per replica."),
    Alias("min_tokens", "", "generation.min_new_tokens", ""),
    Alias("generation_kwargs sampling_params", "", "generation.min_p",
          "Each has a key of its own: temperatures, top_p, top_k, min_p, the penalties, min_new_tokens, stop."),
    Alias("guided_decoding_regex vllm_structured_outputs_regex", "", "generation.guided", "{regex: ...}."),
    Alias("stop_token", "stop_strings", "generation.stop", "Texts; stop tokens come from the model's files."),
    Alias("thinking_token_budget", "", "generation.thinking", "{tokens: 512}."),
    Alias("vllm_engine_kwargs", "engine_kwargs", "generation.engine_args", "vLLM's engine arguments, by name."),
    Alias("mask_truncated_completions overlong_filter", "overlong_buffer", "scorers.reward.missing_eos_penalty",
          "A penalty on answers that are cut off; kind=combined has overlong(tokens, most, cache)."),
    Alias("missing_eos_penalty", "", "scorers.reward.missing_eos_penalty", ""),
    # Models and data.
    Alias("model_name_or_path model sft_model_path base_model", "pretrain actor_rollout_ref.model.path model.path",
          "policy", "A directory, or hf:ORG/NAME."),
    Alias("reward_model_path reward_model_name_or_path reward_funcs reward_model_name",
          "reward_pretrain remote_rm_url custom_reward_function.path reward_model.model.path", "scorers.reward",
          "{kind: reward_model, model: DIRECTORY}, or {kind: rule, function: my_rules.py:score}."),
    Alias("reward_weights", "", "scorers.reward", "{kind: combined, expression: 0.7 * one + 0.3 * other}."),
    Alias("value_model_path", "critic_pretrain critic.model.path", "critic.start", ""),
    Alias("dataset_name dataset dataset_path dataset_config dataset_train_split", "prompt_data train_files input_key",
          "prompts.train", "{source: hf:ORG/NAME, split: train, column: prompt}."),
    Alias("dataset_test_split eval_dataset", "eval_dataset val_files", "prompts.heldout", "{source: ...}."),
    Alias("dataset_text_field", "label_key", "prompts.train.columns", ""),
    Alias("rollout_batch_size generation_batch_size", "rollout_batch_size", "prompts.per_iteration",
          "Counts prompts, not answers; each has generation.k answers."),
    Alias("dataset_mixture", "prompt_data_probs", "prompts.mixture",
          "{NAME: {source: hf:ORG/NAME, weight: 1}}; docs/data.md."),
    Alias("", "dynamic_filtering filter_groups.enable filter_groups.max_num_gen_batches", "prompts.dynamic_sampling",
          "{rounds: 2} allows two further rounds; docs/data.md."),
    Alias("max_samples max_train_samples", "", "prompts.train.limit", ""),
    Alias("system_prompt", "", "prompts.train.system", ""),
    Alias("chat_template_path chat_template", "apply_chat_template input_template", "policy",
          "The template belongs to the model: put a chat_template.jinja into its directory."),
    Alias("dataset_num_proc dataloader_num_workers remove_unused_columns", "", "", "Not needed. Leave it out."),
    # Evaluation, checkpoints, logging.
    Alias("output_dir run_name", "save_path ckpt_path default_local_dir experiment_name", "name",
          "The directory of a run is directory/name."),
    Alias("eval_steps eval_strategy evaluation_strategy do_eval eval_on_start per_device_eval_batch_size",
          "test_freq eval_temperature", "evaluation",
          "Every policy is evaluated on prompts.heldout; this section sets how its answers are sampled."),
    Alias("save_steps save_strategy", "save_freq", "training.checkpoint_seconds",
          "Every iteration publishes its policy; this is the interval at which a training saves its state."),
    Alias("save_total_limit save_only_model", "max_ckpt_num", "retention.keep", 'all, best, or "last 3".'),
    Alias("resume_from_checkpoint overwrite_output_dir", "load_checkpoint resume_mode", "",
          "The same command continues a run. Leave it out; `pipeline run --force STAGE` reruns a stage."),
    Alias("logging_steps logging_strategy logging_dir logging_first_step", "", "",
          "Every step is logged in the stage's training-log.jsonl. Leave it out."),
    Alias("report_to log_with wandb_project wandb_entity tracker_project_name", "use_wandb trainer.logger project_name",
          "tracking", "For example tracking: {wandb: {project: NAME, entity: TEAM}}; or trackio, tensorboard, mlflow."),
    Alias("push_to_hub hub_model_id hub_token hub_strategy hub_private_repo", "", "hub",
          "For example hub: {model: ORG/NAME}. The token is HF_TOKEN's, or that of `hf auth login`."),
    Alias("ddp_timeout", "nccl_timeout", "executor.stall_seconds", ""),
)  # fmt: skip


def dotted_names(name: str, value: Any) -> Iterator[str]:
    """Yield the dotted names of all values below a key."""
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from dotted_names(f"{name}.{key}", item)
    else:
        yield name


def find(name: str) -> Alias | None:
    """The entry for a key, found by the longest suffix of its dotted name that is in the table."""
    parts = name.lower().lstrip("-").replace("-", "_").split(".")
    for start in range(len(parts)):
        if (found := _BY_NAME.get(".".join(parts[start:]))) is not None:
            return found
    return None


_BY_NAME = {name: entry for entry in reversed(TABLE) for name in entry.names}


def markdown() -> str:
    """The table as docs/coming-from-trl.md shows it."""
    lines = ["| TRL, transformers, PEFT, accelerate | OpenRLHF, verl | here | |", "|---|---|---|---|"]
    for entry in TABLE:
        cells = [", ".join(f"`{name}`" for name in names.split()) for names in (entry.trl, entry.others, entry.ours)]
        lines.append(f"| {' | '.join([*cells, entry.note])} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(markdown(), end="")
