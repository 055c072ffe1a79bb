"""TorchTitan's settings that Holdfast names differently or does not have.

Source: `JobConfig` of TorchTitan 0.1.0 to 0.2.2; 0.3 has no TOML files.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

RENAMED = {
    ("checkpoint", "enable_checkpoint"): ("checkpoint", "enable"),
    ("checkpoint", "initial_load_model_weights_only"): ("checkpoint", "initial_load_model_only"),
    ("checkpoint", "last_save_model_weights_only"): ("checkpoint", "last_save_model_only"),
    ("debug", "seed"): ("training", "seed"),
    ("debug", "deterministic"): ("training", "deterministic"),
    ("lr_scheduler", "lr_min"): ("lr_scheduler", "min_lr_factor"),
}
"""Section and key that Holdfast uses, by the section and key that TorchTitan uses."""

WITHOUT_EFFECT = {
    **dict.fromkeys(("comm", "compile", "experimental", "fault_tolerance", "float8"), "*"),
    **dict.fromkeys(("memory_estimation", "mx", "profiling", "quantize", "validation"), "*"),
    "debug": "deterministic_warn_only moe_force_load_balance",
    "job": "custom_config_module print_args print_config save_config_file use_for_integration_test",
    "metrics": "disable_color_printing enable_wandb save_for_all_ranks save_tb_folder",
    "model": "converters print_after_conversion",
    "optimizer": "early_step_in_backward implementation",
    "training": "compile dataloader debug_moe_force_load_balance dtype enable_cpu_offload gc_debug "
    "gc_freq mixed_precision_param mixed_precision_reduce",
    "parallelism": "context_parallel_load_balancer context_parallel_rotate_method "
    "disable_loss_parallel enable_async_tensor_parallel enable_compiled_autograd "
    "expert_parallel_comm_backend expert_tensor_parallel_degree fsdp_reshard_after_forward "
    "module_fqns_per_model_part pipeline_parallel_expert_parallel_overlap "
    "pipeline_parallel_first_stage_less_layers pipeline_parallel_last_stage_less_layers "
    "pipeline_parallel_layers_per_stage pipeline_parallel_microbatch_size "
    "pipeline_parallel_schedule_csv pipeline_parallel_split_points",
    "checkpoint": "enable_ft_dataloader_checkpoints",
    "activation_checkpoint": "debug determinism_check early_stop memory_budget "
    "per_op_sac_force_recompute_mm_shapes_by_fqns preserve_rng_state "
    "visualize_memory_budget_pareto",
}
"""TorchTitan's keys for features that do not exist here, by section; `*`: the whole section."""


def translate(tables: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Rename TorchTitan's keys in `tables`, the sections of a TOML file, to Holdfast's keys. Leave
    out the keys that have no effect.

    Returns the new tables, and the names that were left out as `[section]` or `section.key`.
    Unknown names stay in the tables.
    """
    translated: dict[str, Any] = {}
    without_effect = []
    for section, table in tables.items():
        if WITHOUT_EFFECT.get(section) == "*":
            without_effect.append(f"[{section}]")
            continue
        if not isinstance(table, dict):
            translated[section] = table
            continue
        unused = WITHOUT_EFFECT.get(section, "").split()
        without_effect += [f"{section}.{key}" for key in table if key in unused]
        for key, value in table.items():
            if key not in unused:
                new_section, new_key = RENAMED.get((section, key), (section, key))
                translated.setdefault(new_section, {})[new_key] = value
        if not table:
            translated.setdefault(section, {})
    return translated, without_effect
