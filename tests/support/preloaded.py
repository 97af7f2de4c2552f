"""What the runs of `forked.py` need, imported once."""

import peft  # noqa: F401
import torch
import transformers.models.qwen2.modeling_qwen2
import transformers.models.qwen2_5_vl.modeling_qwen2_5_vl
import transformers.models.qwen3_vl.modeling_qwen3_vl  # noqa: F401
from torch.utils import tensorboard  # noqa: F401

import evaluate  # noqa: F401
import prepare_data  # noqa: F401
import train  # noqa: F401

torch.set_num_threads(1)
