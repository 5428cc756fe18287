"""Pins what this package relies on in megatron-core, so that another release fails here first, by name."""

import importlib
import importlib.metadata
import inspect
from typing import Any

import pytest

HYBRID, TP = "megatron.core.models.hybrid", "megatron.core.tensor_parallel"
MAPPINGS, TRAINING = f"{TP}.mappings", "megatron.training"
MOE = "megatron.core.transformer.moe"

# Path, its parameters in order (without self or cls), and what here relies on it.
SIGNATURES: list[tuple[str, str, str, str]] = [
    (
        f"{HYBRID}.hybrid_block",
        "HybridStack.__init__",
        "config submodules pre_process layer_type_list pp_layer_offset post_layer_norm post_process device dtype "
        "pg_collection is_mtp_layer name",
        "layers/plain.py, layers/stack.py",
    ),
    (
        f"{HYBRID}.hybrid_block",
        "HybridStack.forward",
        "hidden_states attention_mask inference_context rotary_pos_emb inference_params packed_seq_params padding_mask",
        "layers/stack.py replaces it",
    ),
    (
        f"{HYBRID}.hybrid_block",
        "HybridStackSubmodules.__init__",
        "mamba_layer gdn_layer attention_layer dsa_layer mla_layer mlp_layer moe_layer mtp_block_spec",
        "specs.py",
    ),
    (
        f"{HYBRID}.hybrid_model",
        "HybridModel.__init__",
        "config hybrid_stack_spec vocab_size max_sequence_length hybrid_layer_pattern hybrid_attention_ratio "
        "hybrid_mlp_ratio hybrid_override_pattern pre_process post_process fp16_lm_cross_entropy parallel_output "
        "share_embeddings_and_output_weights position_embedding_type rotary_percent rotary_base "
        "scatter_embedding_sequence_parallel seq_len_interpolation_factor pg_collection vp_stage",
        "model.py",
    ),
    (
        f"{HYBRID}.hybrid_model",
        "HybridModel.forward",
        "input_ids position_ids attention_mask decoder_input labels inference_context runtime_gather_output "
        "inference_params loss_mask packed_seq_params padding_mask",
        "model.py replaces it",
    ),
    (
        "megatron.core.recompute",
        "checkpointed_forward",
        "self hidden_states attention_mask context context_mask rotary_pos_emb attention_bias packed_seq_params "
        "use_inner_quantization_context padding_mask extract_layer_indices layer_offset",
        "layers/stack.py does its work: an open argument list would make that needless",
    ),
    ("megatron.core.fp8_utils", "get_fp8_context", "config layer_no is_init", "layers/recompute.py"),
    (
        "megatron.core.ssm.mamba_mixer",
        "MambaMixer.__init__",
        "config submodules d_model d_conv conv_init expand A_init_range D_has_hdim rmsnorm norm_before_gate dt_min "
        "dt_max dt_init dt_scale dt_init_floor bias conv_bias chunk_size layer_number pg_collection pp_layer_offset "
        "name",
        "layers/plain.py, layers/mamba.py",
    ),
    (
        "megatron.core.ssm.mamba_layer",
        "MambaLayer.__init__",
        "config submodules layer_number pg_collection pp_layer_offset name",
        "layers/mamba.py",
    ),
    (
        "megatron.core.transformer.transformer_layer",
        "TransformerLayer.__init__",
        "config submodules layer_number hidden_dropout pg_collection vp_stage is_mtp_layer add_layer_offset "
        "pp_layer_offset name",
        "layers/attention.py",
    ),
    (
        "megatron.core.ssm.mlp_layer",
        "MLPLayer.__init__",
        "config submodules layer_number hidden_dropout pg_collection add_layer_offset name",
        "layers/mlp.py",
    ),
    (
        "megatron.core.transformer.attention",
        "SelfAttention.__init__",
        "config submodules layer_number attn_mask_type cp_comm_type pg_collection pp_layer_offset name",
        "layers/attention.py",
    ),
    (
        "megatron.core.transformer.mlp",
        "MLP.as_mlp_submodule",
        "submodules config pg_collection is_mtp_layer is_expert input_size ffn_hidden_size name",
        "specs.py",
    ),
    (
        TP,
        "ColumnParallelLinear.__init__",
        "input_size output_size config init_method bias gather_output stride keep_master_weight_for_test "
        "skip_bias_add skip_weight_param_allocation embedding_activation_buffer grad_output_buffer is_expert "
        "tp_comm_buffer_name disable_grad_reduce tp_group name",
        "layers/linear.py, model.py",
    ),
    (TP, "ColumnParallelLinear.forward", "input_ weight runtime_gather_output", "layers/linear.py"),
    (TP, "ColumnParallelLinear._forward_impl", "input weight args kwargs", "layers/linear.py"),
    (TP, "RowParallelLinear.forward", "input_", "layers/linear.py"),
    (TP, "RowParallelLinear._forward_impl", "input weight args kwargs", "layers/linear.py"),
    (
        f"{TP}.layers",
        "linear_with_grad_accumulation_and_async_allreduce",
        "input weight bias gradient_accumulation_fusion allreduce_dgrad sequence_parallel grad_output_buffer "
        "wgrad_deferral_limit tp_group gtp_remat_size",
        "layers/linear.py, through _forward_impl",
    ),
    (
        f"{MOE}.moe_layer",
        "MoELayer.__init__",
        "config submodules layer_number pg_collection is_mtp_layer name",
        "layers/moe.py",
    ),
    (
        f"{MOE}.moe_layer",
        "MoELayer.forward",
        "hidden_states intermediate_tensors padding_mask",
        "layers/moe.py replaces it",
    ),
    (f"{MOE}.moe_layer", "MoESubmodules.__init__", "experts shared_experts router", "specs.py, layers/plain_moe.py"),
    (
        f"{MOE}.experts",
        "SequentialMLP.__init__",
        "num_local_experts config submodules pg_collection name",
        "layers/moe.py",
    ),
    (
        f"{MOE}.experts",
        "SequentialMLP.forward",
        "permuted_local_hidden_states tokens_per_expert permuted_probs",
        "layers/moe.py replaces it",
    ),
    (
        f"{MOE}.shared_experts",
        "SharedExpertMLP.__init__",
        "config submodules gate pg_collection name",
        "layers/moe.py",
    ),
    (f"{MOE}.router", "TopKRouter.__init__", "config pg_collection is_mtp_layer", "layers/moe_router.py"),
    (f"{MOE}.router", "TopKRouter.forward", "input padding_mask", "layers/moe_router.py replaces it"),
    (
        f"{MOE}.router",
        "TopKRouter.attach_and_log_load_balancing_loss",
        "activation aux_loss_coeff aux_loss aux_loss_name reduce_group needs_dp_avg valid_token_count",
        "layers/moe_router.py",
    ),
    (
        f"{MOE}.moe_utils",
        "topk_routing_with_score_function",
        "logits topk use_pre_softmax num_groups group_topk scaling_factor score_function expert_bias fused "
        "router_replay dense_output precomputed_indices",
        "layers/moe_router.py",
    ),
    (
        f"{MOE}.moe_utils",
        "switch_load_balancing_loss_func",
        "probs tokens_per_expert total_num_tokens topk num_experts moe_aux_loss_coeff fused padding_mask",
        "layers/moe_router.py",
    ),
    (
        f"{MOE}.token_dispatcher",
        "maybe_move_tensor_to_cpu",
        "tensor as_numpy record_stream",
        "cpu/adaptation.py replaces it",
    ),
    (TP, "checkpoint", "function distribute_saved_activations args", "layers/stack.py, layers/attention.py"),
    (MAPPINGS, "copy_to_tensor_model_parallel_region", "input_ group", "layers/linear.py"),
    (MAPPINGS, "reduce_from_tensor_model_parallel_region", "input_ group", "layers/linear.py"),
    (
        MAPPINGS,
        "gather_from_sequence_parallel_region",
        "input_ tensor_parallel_output_grad group output_split_sizes use_global_buffer",
        "layers/linear.py",
    ),
    (
        MAPPINGS,
        "reduce_scatter_to_sequence_parallel_region",
        "input_ group input_split_sizes use_global_buffer",
        "layers/linear.py",
    ),
    (
        "megatron.core.ssm.mamba_context_parallel",
        "MambaContextParallel.__init__",
        "cp_group d_inner_local_tp nheads_local_tp ngroups_local_tp d_state conv1d_weight_cp1 conv1d_bias_cp1 "
        "conv1d_padding dt_bias_cp1 A_log_cp1 D_cp1 D_has_hdim",
        "layers/mamba.py builds one for every selection",
    ),
    (
        "megatron.core.ssm.mamba_context_parallel",
        "_undo_attention_load_balancing",
        "input_ cp_size packed_seq_params",
        "layers/context_parallel.py",
    ),
    (
        "megatron.core.transformer.dot_product_attention",
        "DotProductAttention.__init__",
        "config layer_number attn_mask_type attention_type attention_dropout softmax_scale cp_comm_type pg_collection",
        "layers/plain.py",
    ),
    (
        "megatron.core.transformer.dot_product_attention",
        "DotProductAttention.forward",
        "query key value attention_mask attn_mask_type attention_bias packed_seq_params",
        "layers/plain.py",
    ),
    (
        "megatron.core.utils",
        "get_batch_on_this_cp_rank",
        "batch is_hybrid_cp cp_group hybrid_cp_group_func use_per_sequence_balancing",
        "layers/context_parallel.py: the order of a rank's slices",
    ),
    (
        "megatron.core.dist_checkpointing.mapping",
        "ShardedTensor.from_rank_offsets",
        "key data rank_offsets replica_id prepend_axis_num flattened_range init_kwargs",
        "model.py",
    ),
    (
        "megatron.core.distributed",
        "finalize_model_grads",
        "model num_tokens pg_collection force_all_reduce",
        "forward_step.py",
    ),
    (f"{TRAINING}.argument_utils", "hybrid_config_from_args", "args config model_config_cls", "training.py"),
    (f"{TRAINING}.argument_utils", "pretrain_cfg_container_from_args", "args model_cfg", "training.py"),
    (
        TRAINING,
        "pretrain",
        "cfg_container train_valid_test_dataset_provider model_type forward_step_func model_provider "
        "process_non_loss_data_func get_embedding_ranks get_position_embedding_ranks non_loss_data_func store "
        "inprocess_call_wrapper p2p_communicator pg_collection skip_model_parallel_init",
        "training.py",
    ),
    (
        f"{TRAINING}.models.hybrid",
        "HybridModelBuilder.build_model",
        "pg_collection pre_process post_process vp_stage",
        "model.py replaces it",
    ),
    (
        f"{TRAINING}.datasets.data_samplers",
        "MegatronPretrainingSampler.__init__",
        "total_samples consumed_samples micro_batch_size data_parallel_rank data_parallel_size drop_last",
        "distillation/roles.py",
    ),
    (
        f"{TRAINING}.datasets.data_samplers",
        "build_pretraining_data_loader",
        "dataset consumed_samples",
        "distillation/roles.py",
    ),
]

# Path, a piece of its source, and what here relies on it.
SOURCES: list[tuple[str, str, str, str]] = [
    (
        f"{MOE}.moe_utils",
        "topk_routing_with_score_function",
        "probs = scores / (scores.sum(dim=-1, keepdim=True) + 1e-20) if topk > 1 else scores",
        "layers/moe_router.py does the same with a mask",
    ),
    (
        f"{MOE}.moe_utils",
        "topk_routing_with_score_function",
        "scores_for_routing = scores + expert_bias.float()",
        "layers/moe_router.py chooses the same with a mask",
    ),
    (
        f"{MOE}.router",
        "TopKRouter._apply_expert_bias",
        "self.local_tokens_per_expert += routing_map.sum(dim=0)",
        "layers/moe_router.py counts the full budget's tokens",
    ),
    (
        f"{MOE}.router",
        "TopKRouter.apply_z_loss",
        "logits, z_loss * num_local_tokens * self.tp_cp_group.size()",
        "layers/moe_router.py scales it so",
    ),
    (
        "megatron.core.distributed.distributed_data_parallel",
        "DistributedDataParallel._make_backward_post_hook",
        "not param.grad_added_to_main_grad or getattr(param, 'zero_out_wgrad', False)",
        "ops/sliced_parameter.py adds into main_grad itself",
    ),
    (
        "megatron.core.distributed.distributed_data_parallel",
        "DistributedDataParallel.zero_grad_buffer",
        "param.grad_added_to_main_grad = False",
        "ops/sliced_parameter.py: the flag lasts one step",
    ),
    (
        "megatron.core.transformer.dot_product_attention",
        "DotProductAttention.__init__",
        "self.config.context_parallel_size == 1",
        "layers/plain.py: LocalCoreAttention hides the size from it",
    ),
    (
        "megatron.core.transformer.attention",
        "Attention.__init__",
        "self.checkpoint_core_attention = (",
        "layers/attention.py",
    ),
    (f"{TP}.layers", "ColumnParallelLinear.__init__", "self.allreduce_dgrad = (", "layers/linear.py"),
    ("megatron.core.ssm.mamba_mixer", "MambaMixer.__init__", "if not HAVE_MAMBA_SSM:", "layers/plain.py raises it"),
    (
        f"{TRAINING}.datasets.data_samplers",
        "MegatronPretrainingSampler.__iter__",
        "if len(batch) == self.micro_batch_times_data_parallel_size:",
        "distillation/roles.py: a run of indices is one microbatch of every rank",
    ),
    (
        f"{TRAINING}.datasets.data_samplers",
        "build_pretraining_data_loader",
        "dataset.index_split",
        "distillation/roles.py: RoleDataset.index_split",
    ),
    (f"{TRAINING}.training", "train", "args.curr_iteration = iteration", "forward_step.py: the step's number"),
    (
        f"{TRAINING}.training",
        "train_step",
        "for key in losses_reduced[0].keys():",
        "forward_step.py: every microbatch returns the same keys",
    ),
]


def resolve(module: str, path: str) -> Any:
    found: Any = importlib.import_module(module)
    for name in path.split("."):
        found = inspect.getattr_static(found, name) if inspect.isclass(found) else getattr(found, name)
        found = found.__func__ if isinstance(found, classmethod | staticmethod) else found
    return found


def explain(module: str, path: str, user: str) -> str:
    version = importlib.metadata.version("megatron-core")
    return f"megatron-core {version}: {module}.{path} is not what this package was written for; look at {user}"


@pytest.mark.parametrize(("module", "path", "parameters", "user"), SIGNATURES, ids=[row[1] for row in SIGNATURES])
def test_signature(module: str, path: str, parameters: str, user: str) -> None:
    found = [name for name in inspect.signature(resolve(module, path)).parameters if name not in ("cls",)]
    if "." in path and found[:1] == ["self"]:
        found = found[1:]
    assert found == parameters.split(), explain(module, path, user)


@pytest.mark.parametrize(("module", "path", "text", "user"), SOURCES, ids=[f"{row[1]}-{row[3]}" for row in SOURCES])
def test_source(module: str, path: str, text: str, user: str) -> None:
    assert text in inspect.getsource(resolve(module, path)), explain(module, path, user)


def test_the_builder_is_named_by_the_config() -> None:
    """`pretrain()` finds our builder by the name in our config's class."""
    from megatron.training.models.hybrid import HybridModelConfig

    from megatron_elastic.model import ElasticModelConfig

    assert isinstance(HybridModelConfig.builder, str)
    module, name = ElasticModelConfig.builder.rsplit(".", 1)
    assert importlib.import_module(module).__dict__[name].__name__ == "ElasticModelBuilder"


def test_a_changed_signature_is_told() -> None:
    with pytest.raises(AssertionError, match=r"finalize_model_grads is not what .* look at forward_step\.py"):
        test_signature("megatron.core.distributed", "finalize_model_grads", "model num_tokens", "forward_step.py")
