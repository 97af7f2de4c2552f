"""Variant (A) of the benchmark: the Hugging Face Trainer with a plain collator, as LLaMA-Factory, TRL and the official
scripts run it: every question a sequence of its own with its image, pixels from the family's image processor, logits
at every position.

One thing is mended: the loss is divided by the answer tokens of the whole optimizer step (the Trainer averages
micro-batch means for these families), so that losses and gradients can be compared. It costs nothing.
"""

import threading
from pathlib import Path

import numpy as np
import torch
from transformers import AutoImageProcessor, PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.loss.loss_utils import ForCausalLMLoss
from workload import Workload

from images import open_image
from templates import CHAT_OPTIONS, to_messages


class Questions(torch.utils.data.Dataset):
    """One question: token ids, labels and float32 pixels, as the family's processors make them."""

    def __init__(self, workload: Workload):
        self.workload = workload
        self.tokenizer = workload.encoder.tokenizer
        self.processor = AutoImageProcessor.from_pretrained(workload.config.model_name, backend="pil")

    def __len__(self) -> int:
        return len(self.workload.samples)

    def __getitem__(self, row: int) -> dict:
        sample, config = self.workload.samples[row], self.workload.config
        image = open_image(Path(config.data.image_root, sample["image"]))
        pixels = self.processor(images=[image], return_tensors="pt")
        *prompt, answer = to_messages(sample, config.template)
        text = self.tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True, **CHAT_OPTIONS)
        count = int(pixels["image_grid_thw"].prod()) // self.workload.family.merge_size**2
        text = text.replace("<|image_pad|>", "<|image_pad|>" * count)
        prompt_ids = self.tokenizer(text)["input_ids"]
        answer_ids = self.tokenizer(answer["content"] + "<|im_end|>")["input_ids"]
        ids = torch.tensor(prompt_ids + answer_ids)
        labels = torch.cat([torch.full((len(prompt_ids),), -100), torch.tensor(answer_ids)])
        return {"input_ids": ids, "labels": labels, **pixels}


class Conversations(Questions):
    """All questions of an image as one conversation, as such data are often packed: the image's tokens stand there
    once, at nearly the cost of a shared prefix. But a later question sees the gold answers of the earlier ones, which
    an evaluation that asks one by one never has: another task is trained."""

    def __init__(self, workload: Workload):
        super().__init__(workload)
        self.rows: dict[str, list[int]] = {}
        for row, sample in enumerate(workload.samples):
            self.rows.setdefault(sample["image"], []).append(row)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        first, *others = (super(Conversations, self).__getitem__(row) for row in list(self.rows.values())[index])
        vision_end = self.tokenizer.convert_tokens_to_ids("<|vision_end|>")
        opening = torch.tensor(self.tokenizer("\n<|im_start|>user\n")["input_ids"])
        ids, labels = [first["input_ids"]], [first["labels"]]
        for turn in others:
            own = int((turn["input_ids"] == vision_end).nonzero()[-1]) + 1  # what follows the image
            ids += [opening, turn["input_ids"][own:]]
            labels += [torch.full_like(opening, -100), turn["labels"][own:]]
        return {**first, "input_ids": torch.cat(ids), "labels": torch.cat(labels)}


class Collator:
    """Pads to the longest question on the right, and joins the images of all."""

    def __init__(self, pad_id: int, image_token_id: int):
        self.pad_id, self.image_token_id = pad_id, image_token_id

    def __call__(self, questions: list[dict]) -> dict:
        def padded(key, value):
            return torch.nn.utils.rnn.pad_sequence([q[key] for q in questions], batch_first=True, padding_value=value)

        ids = padded("input_ids", self.pad_id)
        lengths = torch.tensor([len(q["input_ids"]) for q in questions])
        return {
            "input_ids": ids,
            "attention_mask": (torch.arange(ids.shape[1]) < lengths[:, None]).long(),
            "labels": padded("labels", -100),
            "mm_token_type_ids": (ids == self.image_token_id).int(),
            "pixel_values": torch.cat([q["pixel_values"] for q in questions]),
            "image_grid_thw": torch.cat([q["image_grid_thw"] for q in questions]),
        }


class InOrder(Trainer):
    def _get_train_sampler(self, *args, **kwargs):
        return torch.utils.data.SequentialSampler(self.train_dataset)


class HuggingFace(TrainerCallback):
    """Runs a Trainer in a thread of its own that rests between optimizer steps, so that others can be measured in
    between, step by step."""

    def __init__(
        self, model, workload: Workload, folder: Path, device: torch.device, micro_batch: int, conversations: bool
    ):
        """micro_batch: sequences of a pass. conversations: one an image, see `Conversations`."""
        data = (Conversations if conversations else Questions)(workload)
        sequences = len(data) // workload.steps  # of a step
        micro_batch = max(n for n in range(1, min(micro_batch, sequences) + 1) if sequences % n == 0)
        self.model, self.workload = model, workload
        vocabulary = model.config.text_config.vocab_size
        arguments = TrainingArguments(
            output_dir=str(folder),
            per_device_train_batch_size=micro_batch,
            gradient_accumulation_steps=sequences // micro_batch,
            max_steps=workload.steps,
            learning_rate=workload.config.learning_rate,
            lr_scheduler_type="constant",
            max_grad_norm=workload.config.max_grad_norm,
            optim="adamw_torch",
            weight_decay=workload.config.weight_decay,
            seed=workload.config.seed,
            bf16=device.type == "cuda",
            tf32=device.type == "cuda" or None,
            use_cpu=device.type == "cpu",
            gradient_checkpointing=workload.config.gradient_checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": False},
            dataloader_num_workers=workload.config.dataloader_num_workers,
            dataloader_pin_memory=device.type == "cuda",
            remove_unused_columns=False,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        self.trainer = InOrder(
            model=model,
            args=arguments,
            train_dataset=data,
            data_collator=Collator(workload.encoder.tokenizer.pad_token_id, workload.family.image_token_id),
            callbacks=[self],
            compute_loss_func=lambda outputs, labels, num_items_in_batch=None: ForCausalLMLoss(
                outputs["logits"], labels, vocabulary, num_items_in_batch=num_items_in_batch
            ),
        )
        self.trainer.remove_callback(PrinterCallback)
        self._go, self._rested = threading.Semaphore(0), threading.Semaphore(0)
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None

    def gradients(self, rows: list[int]) -> dict[str, np.ndarray]:
        """Of the mean loss over these samples, by parameter name, at the present weights, without dropout."""
        if isinstance(self.trainer.train_dataset, Conversations):
            rows = [0]  # the first image's; not the same loss
        batches = [self.trainer.data_collator([self.trainer.train_dataset[row]]) for row in rows]
        tokens = sum((batch["labels"] != -100).sum() for batch in batches).to(self.model.device)
        self.model.eval()
        for batch in batches:  # one by one: all of them together may not fit
            batch = {key: value.to(self.model.device) for key, value in batch.items()}
            with self.trainer.compute_loss_context_manager():
                loss = self.trainer.compute_loss(self.model, batch, num_items_in_batch=tokens)
            loss.backward()
        gradients = {name: p.grad.float().cpu().numpy() for name, p in self.model.named_parameters() if p.requires_grad}
        self.model.zero_grad(set_to_none=True)
        self.model.train()
        return gradients

    def step(self) -> None:
        """One optimizer step of the Trainer, its data loading included."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, daemon=True)
            self._thread.start()
        self._go.release()
        self._rested.acquire()
        if self._error:
            raise self._error

    def _run(self) -> None:
        try:
            self._go.acquire()
            self.trainer.train()
        except BaseException as error:
            self._error = error.with_traceback(None)  # its frames would keep a failed step's memory
        self._rested.release()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step < state.max_steps:  # after the last one, `_run` says so
            self._rested.release()
            self._go.acquire()
