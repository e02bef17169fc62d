"""AutoTrain options of its other trainers: accepted with a warning, and without effect on ORPO.

Taken from monostate/aitraining, src/autotrain/trainers/clm/params.py and src/autotrain/cli/run_llm.py.
https://github.com/monostate/aitraining/blob/main/src/autotrain/trainers/clm/params.py
"""

_GROUPS: dict[str, str] = {
    "DPO": "model_ref",
    "SFT": "packing response_only_loss token_weights",
    "Unsloth": "unsloth",
    "AutoTrain's dataset conversion (orpo_dist detects the format itself)": (
        "auto_convert_dataset use_sharegpt_mapping sharegpt_mapping_enabled suggested_chat_template column_mapping "
        "runtime_mapping map_eos_token conversation_extension chat_format save_processed_data"
    ),
    "distillation": (
        "use_distillation teacher_model teacher_prompt_template student_prompt_template distill_temperature "
        "distill_alpha distill_max_teacher_length"
    ),
    "sweeps": (
        "use_sweep sweep_backend sweep_n_trials sweep_metric sweep_direction sweep_params post_trial_script "
        "wandb_sweep wandb_sweep_project wandb_sweep_entity wandb_sweep_id"
    ),
    "enhanced evaluation": (
        "use_enhanced_eval eval_metrics eval_dataset_path eval_save_predictions eval_benchmark custom_metrics"
    ),
    "PPO and GRPO": (
        "rl_gamma rl_gae_lambda rl_kl_coef rl_value_loss_coef rl_clip_range rl_reward_fn rl_multi_objective "
        "rl_reward_weights rl_env_type rl_env_config rl_reward_model_path rl_num_ppo_epochs rl_chunk_size "
        "rl_mini_batch_size rl_optimize_device_cache rl_value_clip_range rl_max_new_tokens rl_top_k rl_top_p "
        "rl_temperature rl_env_module rl_env_class rl_num_generations rl_loss_type rl_mask_truncated_completions "
        "use_vllm vllm_mode vllm_gpu_memory_utilization vllm_server_url vllm_tensor_parallel_size vllm_server_gpus"
    ),
    "custom losses and the manual training loop (ORPO's option is gradient_accumulation)": (
        "custom_loss custom_loss_weights use_forward_backward forward_backward_loss_fn forward_backward_custom_fn "
        "gradient_accumulation_steps manual_optimizer_control optimizer_step_frequency grad_clip_value "
        "manual_checkpoint_control save_state_every_n_steps load_state_from"
    ),
    "sampling and inference": (
        "sample_every_n_steps sample_prompts sample_temperature sample_top_k sample_top_p inference_prompts "
        "inference_max_tokens inference_temperature inference_top_p inference_top_k inference_output"
    ),
    "AutoTrain's W&B terminal view": "wandb_visualizer",
}

IGNORED: dict[str, str] = {name: owner for owner, names in _GROUPS.items() for name in names.split()}


def warn_of(ignored: list[str]) -> str:
    """One line that names the ignored options and the trainers they belong to."""
    owners: dict[str, list[str]] = {}
    for name in ignored:
        owners.setdefault(IGNORED[name], []).append(name)
    parts = "; ".join(f"{', '.join(names)} ({owner})" for owner, names in owners.items())
    return f"these options do not belong to ORPO and are ignored: {parts}."
