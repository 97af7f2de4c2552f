"""What a training step does, in absolute terms. (A run compared with itself would not show a fault in both.)"""

import json

import pytest
import torch
import torch.nn.functional as F
from support.document_runs import document_config, write_documents
from support.run_helpers import log_rows, write_config, write_samples
from support.tiny_runs import build_items, tiny_run, vqa_samples
from torch.utils._python_dispatch import TorchDispatchMode

import train
from batches import collate, weightless
from classification import ClassLoss, attach_head, class_logits
from config import load_config
from dataset import SampleEncoder
from family import load_family
from model import AnswerLoss, forward_logits, load_base, load_tokenizer
from templates import IGNORE


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("steps")
    write_samples(folder)
    return folder


def test_dropout_acts_in_every_step_by_the_steps_own_seed_and_never_in_an_evaluation(data, tiny_models, tmp_path):
    """All questions are one step, and a rate of 0 leaves the weights alone: only dropout can change the loss."""
    model = tiny_models["qwen3_vl"]
    first = write_config(data, model, tmp_path / "first", num_train_epochs=1, warmup_steps=0)
    train.main(["--config", str(first)])  # a fresh adapter adds nothing, and its dropout would not be seen
    changes = {
        "init_adapter": str(tmp_path / "first"),
        "lora": {"dropout": 0.5},
        "learning_rate": 0,
        "order": "sequential",
        "train_bs": 15,
        "grad_accum": 1,
        "eval_steps": 2,
    }
    output = tmp_path / "still"
    train.main(["--config", str(write_config(data, model, output, **changes))])
    losses = [row["loss"] for row in log_rows(output)]
    evaluated = [row["eval_loss"] for row in log_rows(output, "eval_loss")]
    assert len(losses) == 4 and len(evaluated) == 2
    together = [*losses, evaluated[0]]
    assert min(abs(a - b) for i, a in enumerate(together) for b in together[:i]) > 1e-4, together
    assert evaluated[0] == evaluated[1]


def test_gradients_reach_the_optimizer_no_longer_than_max_grad_norm(data, tiny_models, tmp_path, monkeypatch):
    norms = []
    step = torch.optim.AdamW.step

    def spy(self, *arguments):
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        norms.append(float(torch.stack([gradient.norm() for gradient in gradients]).norm()))
        return step(self, *arguments)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    config = write_config(
        data, tiny_models["qwen3_vl"], tmp_path / "clipped", max_grad_norm=0.01, num_train_epochs=1, warmup_steps=0
    )
    train.main(["--config", str(config)])
    assert len(norms) == 4 and norms == pytest.approx([0.01] * 4, rel=1e-3)
    assert all(row["grad_norm"] > 0.02 for row in log_rows(tmp_path / "clipped")), "the log says it before clipping"


def test_the_loss_of_bfloat16_logits_is_computed_in_float32(tiny_models):
    run = tiny_run(tiny_models, "qwen3_vl")
    items, images = build_items(run.encoder(), vqa_samples(2, 3))
    batch = collate(items, images, True, run.tokenizer.pad_token_id)
    model = run.model(torch.bfloat16)
    loss = AnswerLoss(model, run.family)(batch)
    logits = forward_logits(model, batch, run.family, batch["supervised"])
    assert logits.dtype == torch.bfloat16 and loss.dtype == torch.float32
    expected = F.cross_entropy(logits.double(), batch["targets"][batch["targets"] != IGNORE], reduction="sum")
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)


# ---------------------------------------------------------------------------------------------------- classification


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    return write_documents(tmp_path_factory.mktemp("documents"), train=4, val=1, test=1)


@pytest.fixture
def encoder(documents, tiny_models, tmp_path):
    config = load_config(document_config(documents, tiny_models["qwen2"], tmp_path / "unused"))
    return SampleEncoder(config, load_family(config.model_name), load_tokenizer(config.model_name))


@pytest.mark.parametrize("autocast", [False, True])
def test_the_head_computes_in_float32_on_a_bfloat16_model(encoder, documents, autocast):
    model = load_base(encoder.config.model_name, torch.bfloat16)
    attach_head(model, 2, seed=0)
    hidden = []
    model.model.register_forward_hook(lambda _, __, output: hidden.append(output.last_hidden_state))
    samples = json.loads((documents / "text_train.json").read_text())[:1]
    batch = collate([encoder.encode(sample, []) for sample in samples], {}, True, encoder.tokenizer.pad_token_id)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits = class_logits(model, batch, encoder.family)
    assert hidden[0].dtype == torch.bfloat16 and logits.dtype == torch.float32
    expected = hidden[0][:, -1].double() @ model.cls_head.weight.double().T + model.cls_head.bias.double()
    assert torch.allclose(logits.double(), expected, rtol=1e-5, atol=1e-7)


def test_a_document_for_an_idle_rank_has_a_loss_of_zero(encoder, documents):
    model = load_base(encoder.config.model_name, torch.float32)
    attach_head(model, 2, seed=0)
    item = encoder.encode(json.loads((documents / "text_train.json").read_text())[1], [])
    loss = ClassLoss(model, encoder.family)
    idle, busy = (collate([one], {}, True, encoder.tokenizer.pad_token_id) for one in (weightless(item), item))
    assert (idle["answer_tokens"], busy["answer_tokens"]) == (0, 1)
    assert float(loss(idle)) == 0.0 and float(loss(busy)) > 0.1


def test_every_product_of_the_head_is_of_float64_forward_and_backward_so_that_tf32_cannot_round_it(encoder, documents):
    model = load_base(encoder.config.model_name, torch.float32)
    attach_head(model, 2, seed=0)
    model.requires_grad_(True)
    products = []

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
                shapes = {tuple(sorted(x.shape)) for x in args if torch.is_tensor(x)}
                if any(2 in shape for shape in shapes):  # classes
                    products.append({x.dtype for x in args if torch.is_tensor(x)})
            return function(*args, **(kwargs or {}))

    item = encoder.encode(json.loads((documents / "text_train.json").read_text())[1], [])
    batch = collate([item], {}, True, encoder.tokenizer.pad_token_id)
    with Products():
        loss = ClassLoss(model, encoder.family)(batch)
        loss.backward()
    assert loss.dtype == torch.float32 and len(products) == 3 and all(kinds == {torch.float64} for kinds in products)
