"""The classification head beside the language model: its logits, its loss and its file.

A document's class is read off its last token: the hidden state after the language model's final norm goes through one
linear layer. No logits over the vocabulary are computed.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from config import Config
from errors import UserError
from family import Family
from model import AnswerLoss, base_of, read_fitting, states_at
from tasks import task_of
from templates import IGNORE

HEAD_FILE = "cls_head.safetensors"  # weight (num_labels, hidden_size) and bias (num_labels,), float32, always whole


class ExactLinear(nn.Linear):
    """Computes in float64, forward and backward: TF32 and autocast would round a float32 product to 10 or 7 bits."""

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return F.linear(states.double(), self.weight.double(), self.bias.double()).float()


def attach_head(model: nn.Module, num_labels: int, seed: int) -> None:
    """Give a transformers model the module `cls_head`, float32 whatever the model's type. Same seed -> same head on all
    ranks. Its weights start as those of transformers' own heads: normal, of the config's initializer_range."""
    text_config = model.config.get_text_config()
    head = ExactLinear(text_config.hidden_size, num_labels)
    start = torch.randn(head.weight.shape, generator=torch.Generator().manual_seed(seed), device="cpu")
    with torch.no_grad():
        head.weight.copy_(start * text_config.initializer_range)
        head.bias.zero_()
    model.cls_head = head


def class_logits(model: nn.Module, batch: dict, family: Family) -> torch.Tensor:
    """A collated batch of documents -> logits (items, num_labels), float32, in the order of the items."""
    base = base_of(model)
    last = states_at(model, batch, family, batch["last_tokens"])  # (items, hidden_size)
    return base.cls_head(last)


class ClassLoss(nn.Module):
    """One pass -> the summed cross-entropy of its documents' labels (see `model.AnswerLoss`)."""

    def __init__(self, model: nn.Module, family: Family):
        super().__init__()
        self.model, self.family = model, family

    def forward(self, batch: dict, only_logits: bool = False) -> torch.Tensor:
        logits = class_logits(self.model, batch, self.family)
        if only_logits:
            return logits
        return F.cross_entropy(logits, batch["class_labels"], reduction="sum", ignore_index=IGNORE)


def make_loss(model: nn.Module, family: Family, config: Config) -> nn.Module:
    """The loss module of the config's task around a model, with its head where the task has one."""
    return (ClassLoss if task_of(config).HAS_HEAD else AnswerLoss)(model, family)


# ----------------------------------------------------------------------------------------------------------- the file


def save_head(state: dict[str, torch.Tensor], folder: Path) -> None:
    """state: the head's own weight and bias, whole."""
    save_file({name: tensor.detach().cpu().float().contiguous() for name, tensor in state.items()}, folder / HEAD_FILE)


def load_head(model: nn.Module, folder: Path) -> None:
    """Put a saved head into the model's own. Raises: `UserError` where there is none, or it does not fit."""
    path = Path(folder) / HEAD_FILE
    if not path.is_file():
        raise UserError(f"{folder} holds no {HEAD_FILE}; give the folder of a classification run or of its checkpoint")
    head = base_of(model).cls_head
    head.load_state_dict(read_fitting(path, head.state_dict()))


def logged_rates(config: Config, rates: list[float]) -> dict[str, float]:
    """What a log row says of a step's rates besides the first group's. rates: of `model.optimizer_groups`, the head's
    first; a backbone at rate 0 has no group."""
    if not task_of(config).HAS_HEAD:
        return {}
    return {"backbone_learning_rate": 0.0 if config.backbone_learning_rate == 0 else rates[-1]}


def notes(config: Config) -> list[str]:
    """What the log says of a classification run before its first step."""
    if not task_of(config).HAS_HEAD:
        return []
    head = config.learning_rate
    backbone = head if config.backbone_learning_rate is None else config.backbone_learning_rate
    lines = [f"[INFO] Using custom classification optimizer with backbone_lr={backbone:.2e}, head_lr={head:.2e}"]
    if config.eval_steps and config.data.test:
        lines.append("The test curve is reported and never used to choose: the best epoch is the best on val.")
    return lines
