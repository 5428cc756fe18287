"""`torch_dist` checkpoints, tensor by tensor: without a process group, a GPU, or Megatron.

A parameter goes by its stock name (`decoder.layers.3.mixer.in_proj.weight`) even where Megatron stores it in parts.
"""

from megatron_elastic.checkpoint.arguments import model_arguments, model_flags
from megatron_elastic.checkpoint.carried import CARRIED, carried_files, carry, copy_files
from megatron_elastic.checkpoint.disk import Disk
from megatron_elastic.checkpoint.folders import require_free, whole_or_nothing
from megatron_elastic.checkpoint.integrity import (
    add_manifest,
    digests_of,
    file_digests,
    find_verified,
    has_manifest,
    verify,
    write_atomically,
)
from megatron_elastic.checkpoint.names import FUSED_NORMS, STORED_IN_PARTS, TRACKER, TensorInfo, expert_of, stored_names
from megatron_elastic.checkpoint.reading import (
    find_checkpoint,
    fused_norms,
    has_router,
    iteration_folder,
    model_tensor_names,
    parameters,
    read_common,
    read_entries,
    read_family,
    read_metadata,
    read_parameter,
    read_tensor,
    stored_parameters,
    tensor_names,
)
from megatron_elastic.checkpoint.tracker import recover, tracked
from megatron_elastic.checkpoint.writing import (
    LazyTensor,
    save_faults_are_told,
    told,
    write_checkpoint,
    write_faults_are_told,
)

__all__ = [
    "CARRIED",
    "FUSED_NORMS",
    "STORED_IN_PARTS",
    "TRACKER",
    "Disk",
    "LazyTensor",
    "TensorInfo",
    "add_manifest",
    "carried_files",
    "carry",
    "copy_files",
    "digests_of",
    "expert_of",
    "file_digests",
    "find_checkpoint",
    "find_verified",
    "fused_norms",
    "has_manifest",
    "has_router",
    "iteration_folder",
    "model_arguments",
    "model_flags",
    "model_tensor_names",
    "parameters",
    "read_common",
    "read_entries",
    "read_family",
    "read_metadata",
    "read_parameter",
    "read_tensor",
    "recover",
    "require_free",
    "save_faults_are_told",
    "stored_names",
    "stored_parameters",
    "tensor_names",
    "told",
    "tracked",
    "verify",
    "whole_or_nothing",
    "write_atomically",
    "write_checkpoint",
    "write_faults_are_told",
]
