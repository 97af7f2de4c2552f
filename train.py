"""torchrun --nproc_per_node=2 train.py --config configs/exp2.yaml [key=value ...] [--check]

One config in, one output folder out. Plain `python train.py --config ...` runs in a single process. --check is the
preflight: it validates config and data, decodes every image, shows a sample with its label mask, counts parameters
and steps, and exits. The same command again resumes an interrupted run; USR1, TERM or Ctrl-C save and stop it.
"""

import argparse
import contextlib
import math
import os
import time
import warnings
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # it warns in every forked data worker otherwise

import torch
from torch.nn.parallel import DistributedDataParallel

import checkpoint
import classification
import clicks
import model as modeling
import sharding
from checkpoint import TrainerState
from config import Config, check_data_files, load_config, to_dict, to_yaml
from dataset import SampleEncoder, StepDataset, load, load_split
from distributed import Ranks, StopSignal, end_process, start_ranks, stop_ranks, wrap_ddp
from errors import UserError, exit_on_user_error
from family import load_family
from files import write_json
from inference import Stopped, scores_while_training, selection_score
from preflight import (
    batch_arithmetic,
    check_samples,
    describe_images,
    full_check,
    images_and_text,
    make_plan,
    prefix_sharing,
    refuse_leakage,
)
from run_folder import OutputLock, find_resume, rotate
from runlog import RunLog, git_commit, memory_gb, out_of_memory_message, step_line

# torch 2.13 renames the argument, which 2.11 does not know under its new name.
warnings.filterwarnings("ignore", message=".*broadcast_buffers` is deprecated.*")

SAMPLES_ON_TENSORBOARD = 4
MAX_NONFINITE_STEPS = 3  # in a row; then the run stops: it would not recover by itself


def learning_rate_factor(kind: str, step: int, warmup_steps: int, total_steps: int) -> float:
    """Share of the peak rate at the update after `step` done steps, as in transformers' schedules of the same names:
    the first update of a warmup has rate 0."""
    if step < warmup_steps:
        return step / max(1, warmup_steps)
    if kind == "constant":
        return 1.0
    decay_steps = max(1, total_steps - warmup_steps)
    if kind == "linear":
        return max(0.0, (total_steps - step) / decay_steps)
    return max(0.0, 0.5 * (1.0 + math.cos(math.pi * ((step - warmup_steps) / decay_steps))))


def backward_step(loss, micro_batches: list[dict], ranks: Ranks, autocast) -> dict:
    """Forward and backward over this rank's micro-batches of one optimizer step.

    The loss is the mean over the supervised tokens of the whole step, on all ranks: each micro-batch adds
    sum_nll × world_size / tokens_global, and DDP or FSDP averages the gradients over the ranks.
    Returns tokens_global and this rank's nll (sums). All ranks: contains all_reduces.
    """
    tokens_global = ranks.sum(sum(batch["answer_tokens"] for batch in micro_batches))[0]
    nll = torch.zeros((), dtype=torch.float64, device=ranks.device)
    for index, batch in enumerate(micro_batches):
        # Under DDP, gradients travel once, with the last micro-batch. Under FSDP with each: to hold them back, every
        # rank would have to keep the gradients of the whole model.
        hold = isinstance(loss, DistributedDataParallel) and index < len(micro_batches) - 1
        with loss.no_sync() if hold else contextlib.nullcontext(), autocast():
            batch_nll = loss(modeling.to_device(batch, ranks.device))
            (batch_nll * (ranks.world_size / tokens_global)).backward()
        nll += batch_nll.detach()
    return {"tokens_global": tokens_global, "nll": float(nll)}


def is_due(steps: int | str | None, step: int, steps_per_epoch: int) -> bool:
    return bool(steps) and step % (steps_per_epoch if steps == "epoch" else steps) == 0


def train(config: Config, check_only: bool, source: str) -> None:
    stop = StopSignal()
    # --- the config, the data, the ranks: everything that can be wrong is found before weights load ---
    named = [name for name in ("train", "val", "test") if getattr(config.data, name)]
    check_data_files(config, named + ["val"] * bool(config.eval_steps))
    family = load_family(config.model_name)
    if family.has_vision and config.resize == "letterbox":
        family.check_image_size(config.image_size, source)
    encoder = SampleEncoder(config, family, modeling.load_tokenizer(config.model_name))
    clicks.check_convention(config.init_adapter, family, config)
    splits = {name: load_split(config, name) for name in named}
    train_samples = splits["train"]
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if check_only:
        return full_check(config, splits, encoder, world_size) if os.environ.get("RANK", "0") == "0" else None
    for samples in splits.values():
        check_samples(samples, encoder)
    plan = make_plan(config, train_samples, encoder, world_size)

    output = Path(config.output_dir)
    resume_from, notes = None, []
    if int(os.environ.get("RANK", "0")) == 0:
        lock = OutputLock(output)  # noqa: F841 - held until the process ends
        resume_from, notes = find_resume(config, plan.batch, train_samples.sha256)
        clicks.check_convention(resume_from, family, config)
        if not resume_from:
            refuse_leakage(config, splits)
    ranks = start_ranks()
    # Rank 0 has looked; the others follow it, or a folder that changes meanwhile could split them.
    resume_from, notes = ranks.gather([[str(resume_from or ""), notes]] if ranks.is_first else [])[0]
    state = checkpoint.read_state(Path(resume_from)) if resume_from else TrainerState()
    if ranks.any(ranks.is_first and checkpoint.has_lost_best(state, resume_from, output)):
        state.best_step = state.best_score = None
        notes.append("The best checkpoint so far is not in this folder: the best is chosen anew")
    if state.step == plan.total_steps and checkpoint.is_final(output):
        if ranks.is_first:
            print(f"{config.experiment}: already complete at step {state.step}; the model is in {output}", flush=True)
        return stop_ranks()
    log = RunLog(config, ranks, state.step)
    if ranks.is_first:
        (output / checkpoint.MARKER).unlink(missing_ok=True)
        (output / "config.yaml").write_text(to_yaml(config), encoding="utf-8")

    # --- model, optimizer ---
    on_gpu = ranks.device.type == "cuda"
    started = time.perf_counter()
    dtype = torch.bfloat16 if on_gpu else torch.float32
    base = modeling.load_base(config.model_name, dtype, config.quantization)
    if config.task == "cls":
        classification.attach_head(base, config.num_labels, config.seed)
    model = modeling.prepare_training(base, config)
    module = (classification.ClassLoss if config.task == "cls" else modeling.AnswerLoss)(model, family)
    if config.parallel == "fsdp":
        sharding.shard(module, ranks)
    else:
        module.to(ranks.device)
    trainable = modeling.trainable_parameters(model)
    if config.init_adapter and not resume_from:
        notes.append(checkpoint.load_initial(model, config.init_adapter, config))
    foreach = None if config.parallel == "ddp" else False  # all tensors at once: 15 GB more for a 7B on two GPUs
    groups = modeling.optimizer_groups(model, config)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8, foreach=foreach)
    peak_rates = [group["lr"] for group in optimizer.param_groups]
    if resume_from:
        checkpoint.resume(Path(resume_from), model, optimizer, trainable, config)
    loss = module
    if ranks.world_size > 1 and config.parallel == "ddp":
        loss = wrap_ddp(module, ranks)

    def autocast():  # of float32 weights; fsdp casts them itself
        float32 = config.finetuning == "full" and config.parallel == "ddp"
        return torch.autocast("cuda", torch.bfloat16, enabled=on_gpu and float32)

    # --- describe the run ---
    log.say("✓ TF32 enabled" if on_gpu else "✓ float32 on CPU")
    log.say(ranks.describe())
    log.say(describe_images(config, family))
    log.say(config.experiment)
    seconds = time.perf_counter() - started
    log.say(f"Model {config.model_name} ({family.model_type}), ready in {seconds:.1f} s; commit {git_commit()}")
    arithmetic = batch_arithmetic(config, plan, world_size) + prefix_sharing(
        config, plan, train_samples, encoder, world_size
    )
    for line in [*modeling.parameter_table(model), *arithmetic, *classification.notes(config), *notes]:
        log.say(line)
    if not resume_from and ranks.is_first:
        for row in range(min(SAMPLES_ON_TENSORBOARD, len(train_samples))):
            log.sample(row, *images_and_text(train_samples[row], encoder))
    if resume_from:
        log.say(f"Resuming from {resume_from}: step {state.step}/{plan.total_steps}")

    # --- the loop ---
    records = clicks.records(family, config)  # kept beside the weights
    trained: list = []  # [step, sample ids of this rank], until written out

    def save(reason: str = "") -> None:
        """All ranks: contains all_gathers and all_reduces."""
        log.order(ranks.gather(trained))
        trained.clear()
        state.config, state.global_batch, state.ranks = to_dict(config), plan.batch, ranks.world_size
        state.train_data = train_samples.sha256
        size, seconds = checkpoint.save(output, model, optimizer, trainable, state, config, records, ranks)
        log.say(f"Saved checkpoint-{state.step} ({size / 1e6:.1f} MB in {seconds:.2f} s){reason}")
        if ranks.is_first:
            rotate(output, config.save_total_limit, state.best_step)

    def evaluate() -> None:
        """All ranks: contains all_reduces. Raises `Stopped`."""
        state.evaluation_due = True
        began = time.perf_counter()
        model.eval()
        with sharding.unsharded(module), autocast():
            values = scores_while_training(module, splits, encoder, ranks, lambda: stop.requested)
        model.train()
        state.evaluation_due = False
        values["eval_seconds"] = time.perf_counter() - began
        log.record({"step": state.step, "epoch": plan.epoch_at(state.step), **values}, "eval")
        log.say("eval " + " | ".join(f"{key.removeprefix('eval_')} {value:.4f}" for key, value in values.items()))
        # The best is only worth keeping where there is a checkpoint of it. For cls one is made, as its result.
        saved = is_due(config.save_steps, state.step, plan.steps_per_epoch) or state.step == plan.total_steps
        better = state.best_score is None or selection_score(config.task, values) > state.best_score
        if better and (saved or config.task == "cls"):
            state.best_score, state.best_step = selection_score(config.task, values), state.step

    dataset = StepDataset(
        train_samples, encoder, config.share_prefix, plan, config.train_bs, ranks.rank, ranks.world_size
    )
    steps = load(dataset, range(state.step, plan.total_steps), config.dataloader_num_workers, ranks.device)
    interval = state.interval or dict.fromkeys(("nll", "answer_tokens"), 0)
    clock = dict.fromkeys(("steps", "questions", "tokens", "waited"), 0.0)  # since the last line, this process
    clock_started = time.perf_counter()
    model.train()
    stopped = False
    try:
        if state.evaluation_due:
            evaluate()
            if config.task == "cls" and state.best_step == state.step:
                save()  # where the folder it was resumed from is another one
        while state.step < plan.total_steps:
            # ---- the training step ----
            began = time.perf_counter()
            loaded = next(steps)
            micro_batches = loaded["micro_batches"]
            waited = time.perf_counter() - began
            if config.parallel == "fsdp":
                micro_batches = sharding.pad_micro_batches(micro_batches, ranks)
            torch.manual_seed(((config.seed * 1_000_003 + state.step) * 4_099 + ranks.rank) % 2**63)  # dropout
            try:
                sums = backward_step(loss, micro_batches, ranks, autocast)
            except torch.OutOfMemoryError:
                raise UserError(out_of_memory_message(micro_batches, config)) from None
            grad_norm = torch.nn.utils.clip_grad_norm_(trainable.values(), config.max_grad_norm)
            grad_norm = float(sharding.full_tensor(grad_norm))
            laid_out = sum(int((batch["segments"] >= 0).sum()) for batch in micro_batches)
            total_nll, total_laid_out, stop_wanted, total_waited = ranks.sum(
                sums["nll"], laid_out, stop.requested, waited
            )
            rates = [
                rate * learning_rate_factor(config.lr_scheduler_type, state.step, config.warmup_steps, plan.total_steps)
                for rate in peak_rates
            ]
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate
            finite = math.isfinite(total_nll) and math.isfinite(grad_norm)  # the same numbers on all ranks
            if finite:
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            state.step += 1
            trained.append([state.step, loaded["sample_ids"]])

            # ---- once in a while: a loss that is no number ----
            state.nonfinite_in_a_row = 0 if finite else state.nonfinite_in_a_row + 1
            if not finite:
                ids = ranks.gather(
                    [f for b in micro_batches for f in b["sample_ids"]] if not math.isfinite(sums["nll"]) else []
                )
                log.say(
                    f"step {state.step}: loss {total_nll / sums['tokens_global']}, grad_norm {grad_norm}: not finite, "
                    f"no update. Samples of the ranks concerned: {', '.join(ids) or 'none (the gradient overflowed)'}"
                )
                if state.nonfinite_in_a_row >= MAX_NONFINITE_STEPS:
                    raise UserError(
                        f"{MAX_NONFINITE_STEPS} steps in a row without a finite loss, the last at step {state.step}; "
                        "lower learning_rate or look at the samples named above. The checkpoint before is intact"
                    )

            # ---- once in a while: log ----
            if finite:
                interval["nll"] += total_nll
                interval["answer_tokens"] += sums["tokens_global"]
            clock["steps"] += 1
            clock["questions"] += len(plan.questions(state.step - 1))
            clock["tokens"] += total_laid_out
            clock["waited"] += total_waited / ranks.world_size
            done = state.step == plan.total_steps
            if (is_due(config.logging_steps, state.step, plan.steps_per_epoch) or done) and interval["answer_tokens"]:
                seconds = time.perf_counter() - clock_started
                values = {
                    "step": state.step,
                    "epoch": plan.epoch_at(state.step),
                    "loss": interval["nll"] / interval["answer_tokens"],
                    "grad_norm": grad_norm,
                    "learning_rate": rates[0],
                    **classification.logged_rates(config, rates),
                    "seconds_per_step": seconds / clock["steps"],
                    "qa_per_second": clock["questions"] / seconds,
                    "tokens_per_second": clock["tokens"] / seconds,
                    "data_share": clock["waited"] / seconds,
                    "memory_gb": memory_gb(ranks.device),
                }
                log.record(values, "train")
                eta = (plan.total_steps - state.step) * values["seconds_per_step"]
                log.say(step_line(values, plan.total_steps, eta))
                interval = dict.fromkeys(interval, 0)
                clock = dict.fromkeys(clock, 0.0)
                state.train_seconds += seconds
                clock_started = time.perf_counter()
            state.interval = interval

            # ---- once in a while: evaluate, save, stop ----
            paused = time.perf_counter()
            if config.eval_steps and (is_due(config.eval_steps, state.step, plan.steps_per_epoch) or done):
                evaluate()
            best = config.task == "cls" and state.best_step == state.step
            if is_due(config.save_steps, state.step, plan.steps_per_epoch) or done or best:
                save()
            elif stop_wanted:
                save(" before stopping")
            clock_started += time.perf_counter() - paused  # seconds_per_step counts training only
            if stop_wanted and not done:
                stopped = True
                break
    except Stopped:
        stopped = True
        save(" before stopping, its evaluation still due")
    if stopped:
        if ranks.is_first:
            write_json(output / checkpoint.MARKER, {"step": state.step, "signal": stop.name})
        log.say(f"Stopped at step {state.step}/{plan.total_steps} on request; the same command goes on from here")
    else:
        if config.task == "cls" and state.best_step not in (None, state.step):
            checkpoint.load_best(output / f"checkpoint-{state.best_step}", model, trainable, config)
            log.say(f"The best on val was step {state.best_step}, accuracy {state.best_score[0]:.4f}: it is the result")
        checkpoint.save_final(output, model, config, records, ranks)
        minutes = state.train_seconds / 60
        log.say(f"Done: {plan.total_steps} steps in {minutes:.1f} min of training; the model is in {output}")
    log.close()
    ranks.barrier()
    del loss  # see stop_ranks
    stop_ranks()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--check", action="store_true", help="validate everything and exit without training")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override any config key, e.g. lora.r=32")
    args = parser.parse_intermixed_args(arguments)
    train(load_config(args.config, args.overrides), args.check, args.config)


if __name__ == "__main__":
    with exit_on_user_error():
        main()
    end_process()
