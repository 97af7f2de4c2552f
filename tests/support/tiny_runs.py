"""What the core's tests share: small images, samples, a config for each tiny model, and the real commands."""

import contextlib
import functools
import hashlib
import io
import runpy
import signal
import sys
import types
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from conftest import REPO_ROOT
from PIL import Image

import inference
from batches import BatchPlan
from config import load_config
from dataset import SampleEncoder, StepDataset
from family import Family, load_family
from model import AnswerLoss, load_base, load_tokenizer, prepare_training, trainable_parameters
from samples import SampleList
from support import configs
from support.configs import IMAGE_SIZE  # noqa: F401 - for the tests
from templates import IGNORE

FAMILIES = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5"]
END = "<|im_end|>"
STOP_SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def write_images(folder: Path, names, size=(60, 45), seed=0) -> Path:
    """Images of smooth noise, each different. size: (width, height) in pixels."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names):
        noise = np.random.default_rng([seed, number]).integers(0, 256, (6, 8, 3), dtype=np.uint8)
        Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).save(folder / name)
    return folder


def vqa_samples(images=3, questions=4, images_each=1) -> list[dict]:
    """Samples in the order of the images, `questions` for each; answers and questions differ in length."""
    answers = ["red", "blue; green", "none", "upper-left; center; lower-right"]
    samples = []
    for image in range(images):
        shown = [f"{(image + i) % images}.png" for i in range(images_each)]
        for question in range(questions):
            samples.append(
                {
                    "id": f"p{image}q{question}",
                    **({"image": shown[0]} if images_each == 1 else {"images": shown}),
                    "question": f"What color is finding {question}?" + " Look well." * (question % 3),
                    "answer": answers[(image + question) % len(answers)],
                    "candidates": ["red", "blue", "green", "none"],
                    "multi_label": True,
                    "stage": 1 + question % 3,
                    "group": str(image),
                }
            )
    return samples


def config_values(folder: Path, model, family: str = "qwen3_vl", **changes) -> dict:
    """The values of a small run's YAML file; its data lie in `folder`."""
    data = {name: str(folder / f"{name}.json") for name in ("train", "val", "test")}
    defaults = {
        "results_dir": str(folder / "results"),
        "learning_rate": 1e-3,
        "lora": {"r": 4, "alpha": 8, "dropout": 0.0},
        "image_size": configs.IMAGE_SIZE.get(family),
        **changes,
        "data": {**data, **changes.get("data", {})},
    }
    return configs.config_values(folder, model, folder / "out", **defaults)


def write_config(folder: Path, model, family: str = "qwen3_vl", **changes) -> Path:
    return configs.write_values(folder / "config.yaml", config_values(folder, model, family, **changes))


class TinyRun:
    """A family's tiny model with a config, a tokenizer and three images. Shared over tests: leave it as it is."""

    def __init__(self, model_folder: Path, folder: Path, family: str):
        self.name, self.model_folder = family, model_folder
        self.folder = write_images(folder, ["0.png", "1.png", "2.png"])
        self.config = load_config(write_config(self.folder, model_folder, family))
        self.family: Family = load_family(self.config.model_name)
        self.tokenizer = load_tokenizer(self.config.model_name)

    def encoder(self, **changes) -> SampleEncoder:
        return SampleEncoder(replace(self.config, **changes), self.family, self.tokenizer)

    @functools.lru_cache(maxsize=4)  # noqa: B019 - the run lives as long as the session
    def model(self, dtype: torch.dtype = torch.float32):
        """The adapted model. Its adapter is random in both halves: a fresh one has B = 0 and hides half the path."""
        return self.fresh_model(dtype).eval()

    def fresh_model(self, dtype: torch.dtype, **changes):
        """As `model`, for a changed config, and of the caller's own."""
        config = replace(self.config, **changes)
        model = prepare_training(load_base(config.model_name, torch.float32), config)
        generator = torch.Generator().manual_seed(1)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data = torch.randn(parameter.shape, generator=generator) * 0.05
        model = model.to(dtype)
        if dtype == torch.float64:
            for module in model.modules():
                if type(module).__name__.startswith("Qwen3_5"):
                    module.forward = in_float64(module.forward)
                elif type(module).__name__.endswith("RMSNorm"):
                    module.forward = types.MethodType(_exact_rms_norm, module)
        return model


def _exact_rms_norm(self, hidden: torch.Tensor) -> torch.Tensor:
    """transformers' own without its detour through float32, which would round away the digits that tests compare."""
    return self.weight * hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)


def in_float64(forward):
    """A part of Qwen3.5 without its detours through float32, for the same reason."""

    def exact(*args, **kwargs):
        with (
            mock.patch.object(torch, "float32", torch.float64),
            mock.patch.object(torch.Tensor, "float", torch.Tensor.double),
        ):
            return forward(*args, **kwargs)

    return exact


_RUNS: dict[str, TinyRun] = {}


def tiny_run(tiny_models, family: str, **sizes: int) -> TinyRun:
    """The family's run, or that of a model of other sizes, made once a session."""
    folder = tiny_models.build(family, **sizes) if sizes else tiny_models[family]
    if str(folder) not in _RUNS:
        _RUNS[str(folder)] = TinyRun(folder, tiny_models.root / f"run-{folder.name}", family)
    return _RUNS[str(folder)]


def build_items(encoder: SampleEncoder, samples, generation: bool = False):
    """(items, decoded images) of samples, as the datasets make them."""
    images: dict = {}
    items = []
    for sample in SampleList(samples, "samples"):
        for path in encoder.images_of(sample):
            images.setdefault(path, encoder.load_image(path))
        items.append(encoder.encode(sample, [images[path] for path in encoder.images_of(sample)], generation))
    return items, images


def supervised_text(batch: dict, tokenizer) -> list[str]:
    """What each question of a collated batch is trained to say: its labels, decoded, in the order of the items."""
    texts = {}
    for row, items in enumerate(batch["slots"].tolist()):
        for segment, item in enumerate(items, 1):
            own = (batch["segments"][row] == segment) & (batch["targets"][row] != IGNORE)
            if item >= 0:
                texts[item] = tokenizer.decode(batch["targets"][row][own])
    in_no_segment = (batch["segments"] <= 0) & (batch["targets"] != IGNORE)
    assert not in_no_segment.any(), "labels on the shared prefix or on padding"
    return [texts[item] for item in range(len(texts))]


def loss_and_gradients(loss, batch: dict):
    """(loss, {name: gradient}) of one pass."""
    loss.zero_grad()
    value = loss(batch)
    value.backward()
    gradients = {name: p.grad.clone() for name, p in loss.model.named_parameters() if p.grad is not None}
    loss.zero_grad()
    return value.item(), gradients


def steps_to_compare() -> dict[str, tuple[list[dict], int]]:
    """name -> (the questions of one step, pass_tokens): few and many passes, a rank without a question, and one image
    with 300 questions beside others with one, none and several."""
    samples = vqa_samples(3, 4)
    mixed = [samples[i] for i in (0, 4, 1, 8, 2, 5, 9, 3)]
    return {
        "eight": (mixed, 200),
        "eight_by_ones": (mixed, 1),
        "uneven": (mixed[:5], 100),
        "one_question": (mixed[:1], 1000),
        "crowded": ([*vqa_samples(1, 300), *mixed_samples()], 2000),
    }


def step_gradients(run: TinyRun, samples, pass_tokens: int, ranks) -> tuple[dict, dict]:
    """({"nll" of this rank, "answer_tokens" of the step}, gradients over all ranks) of one step in float64."""
    from distributed import sum_gradients
    from train import backward

    plan = BatchPlan(len(samples), len(samples), 1, "sequential", 0)
    dataset = StepDataset(
        SampleList(samples, "s"), run.encoder(), True, plan, pass_tokens, ranks.rank, ranks.world_size
    )
    loss = AnswerLoss(run.model(torch.float64), run.family)
    loss.zero_grad()
    step = dataset[0]
    nll = float(backward(loss, step["passes"], step["answer_tokens"], ranks, "ddp", contextlib.nullcontext))
    if ranks.world_size > 1:
        trained = {name: p for name, p in loss.model.named_parameters() if p.requires_grad}
        sum_gradients(trained, [count > 0 for count in ranks.sum(*(p.grad is not None for p in trained.values()))])
    gradients = {name: p.grad.clone() for name, p in loss.model.named_parameters() if p.grad is not None}
    loss.zero_grad()
    return {"nll": nll, "answer_tokens": step["answer_tokens"]}, gradients


VISION_TOO = {"vision_frozen": False, "projector_frozen": False}
TRAINED = {
    "adapter": {},
    "adapter_on_vision_too": VISION_TOO,
    "language_model": {"finetuning": "full"},
    "language_model_and_projector": {"finetuning": "full", "projector_frozen": False},
    "everything": {"finetuning": "full", **VISION_TOO},
}
CUTS = (1, 200, 100_000)  # pass_tokens: each image's row in a pass of its own, some rows together, all in one


def mixed_samples() -> list[dict]:
    """For steps of six questions: with no, one and three images; without any; with one in the last question alone; and
    two questions more, the second without an image."""
    text = [{key: value for key, value in sample.items() if key != "image"} for sample in vqa_samples(3, 4)]
    one, three = vqa_samples(3, 4), vqa_samples(3, 4, images_each=3)
    first = [text[0], one[1], three[2], text[3], one[2], text[5]]
    return [*first, *text[:6], *text[6:11], three[5], one[9], text[11]]


def mixed_run(run: TinyRun, trained: str, pass_tokens: int, ranks) -> tuple[list[dict], dict]:
    """(gradients of each step, weights at the end) of `training_step` over `mixed_samples`, in float64. Plain SGD: what
    AdamW makes of a gradient that is zero but for rounding is as large as a step gets."""
    import train
    from checkpoint import TrainerState

    samples = SampleList(mixed_samples(), "s")
    plan = BatchPlan(len(samples), 6, 1, "sequential", 0)
    config = replace(run.config, max_grad_norm=1e9, lr_scheduler_type="constant", **TRAINED[trained])
    dataset = StepDataset(samples, run.encoder(), True, plan, pass_tokens, ranks.rank, ranks.world_size)
    model = run.fresh_model(torch.float64, **TRAINED[trained]).train()
    trainable = trainable_parameters(model)
    optimizer = torch.optim.SGD(trainable.values(), lr=0.1)
    gradients = []
    optimizer.register_step_pre_hook(
        lambda *_: gradients.append({name: p.grad.clone() for name, p in trainable.items() if p.grad is not None})
    )
    steps = train.Run(
        config=config,
        encoder=dataset.encoder,
        splits={"train": samples},
        plan=plan,
        ranks=ranks,
        stop=types.SimpleNamespace(requested=False),
        log=None,
        state=TrainerState(),
        model=model,
        loss=AnswerLoss(model, run.family),
        trainable=trainable,
        optimizer=optimizer,
        peak_rates=[0.1],
        records={},
        lock=None,
    )
    with exact_rotary_embedding():
        for step in range(plan.total_steps):
            train.training_step(steps, dataset[step]["passes"], dataset[step]["answer_tokens"], 0.0)
    return gradients, {name: parameter.detach() for name, parameter in trainable.items()}


@contextlib.contextmanager
def exact_rotary_embedding():
    """The vision tower's in float64: transformers' own rounds queries, keys and their gradients to float32."""
    from transformers.models.qwen3_vl import modeling_qwen3_vl

    def rotate(q, k, cos, sin):
        cos, sin = cos.unsqueeze(-2).to(q.dtype), sin.unsqueeze(-2).to(q.dtype)
        return tuple(x * cos + modeling_qwen3_vl.rotate_half(x) * sin for x in (q, k))

    with mock.patch.object(modeling_qwen3_vl, "apply_rotary_pos_emb_vision", rotate):
        yield


def sha256_of(tensors: dict) -> str:
    parts = [name.encode() + tensors[name].numpy().tobytes() for name in sorted(tensors)]
    return hashlib.sha256(b"".join(parts)).hexdigest()


def largest_relative_difference(first: dict, second: dict) -> float:
    """Of two sets of named tensors, over the tensors: norm of the difference / norm."""
    assert first.keys() == second.keys() and first
    return max(float((first[name] - second[name]).norm() / first[name].norm().clamp_min(1e-30)) for name in first)


@contextlib.contextmanager
def calls_to(module: torch.nn.Module):
    """Records (arguments, keyword arguments, whether gradients are on) of each call."""
    calls = []
    handle = module.register_forward_pre_hook(
        lambda _, args, kwargs: calls.append((args, kwargs, torch.is_grad_enabled())), with_kwargs=True
    )
    try:
        yield calls
    finally:
        handle.remove()


@contextlib.contextmanager
def short_answers(max_new_tokens: int = 8):
    """Evaluations cut answers off early: random models hardly ever end by themselves."""
    before = inference.greedy
    inference.greedy = functools.partial(before, max_new_tokens=max_new_tokens)
    try:
        yield
    finally:
        inference.greedy = before


def run_script(script: str, *arguments: str) -> tuple[int, str, str]:
    """Run a script of the repo as `python SCRIPT ARGUMENTS` would, in this process (a new one spends seconds on
    imports). Returns (exit code, stdout, stderr)."""
    out, err = io.StringIO(), io.StringIO()
    before = sys.argv
    sys.argv = [script, *map(str, arguments)]
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    code = 0
    try:
        with (
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            mock.patch("distributed.end_process", sys.exit),  # it would end this process, which runs all the tests
        ):
            runpy.run_path(str(REPO_ROOT / script), run_name="__main__")
    except SystemExit as end:
        code = end.code or 0
    finally:
        sys.argv = before
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return code, out.getvalue(), err.getvalue()
