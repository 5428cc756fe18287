"""`torch_dist` checkpoints, tensor by tensor: without a process group, a GPU, or Megatron.

A parameter goes by its stock name (`decoder.layers.3.mixer.in_proj.weight`) even where Megatron stores it in parts.
"""

from megatron_elastic.checkpoint.names import FUSED_NORMS, STORED_IN_PARTS, TRACKER, TensorInfo
from megatron_elastic.checkpoint.reading import (
    find_checkpoint,
    model_tensor_names,
    parameters,
    read_common,
    read_metadata,
    read_parameter,
    read_tensor,
    tensor_names,
)
from megatron_elastic.checkpoint.writing import LazyTensor, write_checkpoint

__all__ = [
    "FUSED_NORMS",
    "STORED_IN_PARTS",
    "TRACKER",
    "LazyTensor",
    "TensorInfo",
    "find_checkpoint",
    "model_tensor_names",
    "parameters",
    "read_common",
    "read_metadata",
    "read_parameter",
    "read_tensor",
    "tensor_names",
    "write_checkpoint",
]
