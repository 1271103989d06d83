"""Operations of lemo as torch functions; each is also ``torch.ops.lemo.<name>`` with a schema and a fake kernel.

fp32 on the CPU, fp16 and bf16 on CUDA (current stream). Wrong arguments raise ValueError before anything is written, a
missing kernel NotImplementedError, non-finite scores FloatingPointError, device errors RuntimeError.
"""

from lemo.ops.attention import attention, attention_backward, attention_forward, transpose_tile_lists
from lemo.ops.blocks import SelectInfo, block_scores, predict, select_blocks
from lemo.ops.elementwise import relu_, relu_backward_, rotary, swiglu, swiglu_backward, swiglu_backward_
from lemo.ops.loss import linear_cross_entropy, linear_cross_entropy_loss
from lemo.ops.rows import gather, gather_norm, gather_norm_backward, gather_norm_backward_, norm, scatter_add_
from lemo.ops.tiles import list_tiles, select_tiles_, tile_scores

__all__ = [
    "SelectInfo",
    "attention",
    "attention_backward",
    "attention_forward",
    "block_scores",
    "gather",
    "gather_norm",
    "gather_norm_backward",
    "gather_norm_backward_",
    "linear_cross_entropy",
    "linear_cross_entropy_loss",
    "list_tiles",
    "norm",
    "predict",
    "relu_",
    "relu_backward_",
    "rotary",
    "scatter_add_",
    "select_blocks",
    "select_tiles_",
    "swiglu",
    "swiglu_backward",
    "swiglu_backward_",
    "tile_scores",
    "transpose_tile_lists",
]
