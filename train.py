"""torchrun --nproc_per_node=2 train.py --config configs/exp2.yaml [key=value ...] [--check]

One config in, one output folder out. Plain `python train.py --config ...` runs in a single process. --check is the
preflight: it validates config and data, decodes every image, shows a sample with its label mask, counts parameters
and steps, and exits. The same command again resumes an interrupted run; USR1, TERM or Ctrl-C save and stop it.
"""

import argparse
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # it warns in every forked data worker otherwise

import torch

import checkpoint
import classification
import model as modeling
import recurrent
import sharding
from batches import BatchPlan
from checkpoint import TrainerState
from config import Config, check_data_files, load_config, to_dict, to_yaml
from dataset import SampleEncoder, StepDataset, load
from distributed import (
    Ranks,
    StopSignal,
    all_or_raise,
    check_same_start,
    in_turns,
    run_command,
    start_ranks,
    stop_ranks,
    sum_gradients,
)
from errors import UserError
from family import fingerprint
from files import full_disk_is_said, write_json, write_text
from forecast import device_name, evaluation_line, out_of_memory_is_said, pass_budget, try_largest_passes
from inference import Stopped, scores_while_training
from preflight import (
    batch_arithmetic,
    check_input_hashes,
    check_samples,
    describe_images,
    full_check,
    images_and_text,
    input_hashes,
    make_plan,
    missing_candidates,
    open_encoder,
    prefix_sharing,
    refuse_leakage,
    survey,
)
from run_folder import OutputLock, find_resume, rotate
from runlog import Meter, RunLog, git_commit, memory_gb, step_line
from samples import SampleList, load_split
from tasks import check_record, counted, records

SAMPLES_ON_TENSORBOARD = 4
MAX_NONFINITE_STEPS = 3  # in a row; then the run stops: it would not recover by itself


@dataclass
class Run:
    """What the training step and the "once in a while" blocks need; `state` is what a checkpoint keeps of it."""

    config: Config
    encoder: SampleEncoder
    splits: dict[str, SampleList]
    plan: BatchPlan
    ranks: Ranks
    stop: StopSignal
    log: RunLog
    state: TrainerState
    model: torch.nn.Module
    loss: torch.nn.Module  # a collated pass -> its summed negative log-likelihood
    trainable: dict[str, torch.nn.Parameter]
    optimizer: torch.optim.Optimizer
    peak_rates: list[float]  # of the optimizer's groups
    records: dict[str, dict]  # file name -> content of what is kept beside the weights; on the first rank
    lock: OutputLock | None  # the first rank's; held until the process ends

    @property
    def output(self) -> Path:
        return Path(self.config.output_dir)

    @property
    def is_done(self) -> bool:
        return self.state.step == self.plan.total_steps

    def is_due(self, steps: int | str | None) -> bool:
        """Whether an interval of the config, in steps or 'epoch', ends with the step just done."""
        return bool(steps) and self.state.step % (self.plan.steps_per_epoch if steps == "epoch" else steps) == 0

    def autocast(self):
        """bfloat16 products of float32 weights on GPUs; FSDP casts them itself."""
        float32 = self.config.finetuning == "full" and self.config.parallel == "ddp"
        return torch.autocast("cuda", torch.bfloat16, enabled=float32 and self.ranks.device.type == "cuda")


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


# ------------------------------------------------------------------------------------------------------- set-up


def open_data(config: Config, source: str) -> tuple[SampleEncoder, list[str]]:
    """The encoder and the names of the splits of a config. Raises: `UserError` where a file of theirs is missing, or
    this machine cannot train so."""
    named = [name for name in ("train", "val", "test") if getattr(config.data, name)]
    check_data_files(config, ["train", *named] + ["val"] * bool(config.eval_steps))
    return open_encoder(config, source), named


def load_splits(config: Config, named: list[str]) -> dict[str, SampleList]:
    return {name: load_split(config, name) for name in named}


def check_initial(config: Config) -> None:
    """Only a fresh run needs the adapter that it starts from. Raises: `UserError` where it does not fit."""
    if config.init_adapter:
        checkpoint.check_initial(Path(config.init_adapter), config)


def scored(config: Config, encoder: SampleEncoder, splits: dict[str, SampleList]) -> str:
    """What an evaluation's scores are of: the samples of val, and which of them. Scores of others do not compare."""
    rows = "all" if encoder.task.HAS_HEAD else config.eval_max_samples
    return f"{splits['val'].sha256} {rows}" if "val" in splits else ""


def find_start(config: Config, encoder: SampleEncoder, splits: dict[str, SampleList], plan: BatchPlan) -> list:
    """[the checkpoint to go on from or "", lines about it, hashes of images and prompt, the row of the longest sample],
    after everything that can be wrong with data and folder has been looked at. On the first rank, for all: a folder
    that changes meanwhile could split them."""
    for samples in splits.values():
        check_samples(samples, encoder)
    resume_from, notes = find_resume(config, plan.batch, splits["train"].sha256)
    hashes = input_hashes(splits["train"], encoder) | {"order": plan.sha256()}
    if resume_from:
        check_input_hashes(resume_from, checkpoint.read_state(resume_from).input_hashes, hashes, config)
    check_record(resume_from or config.init_adapter, encoder.family, config)
    if not resume_from:
        check_initial(config)
        refuse_leakage(config, splits)
    notes += missing_candidates(splits["train"], encoder) + evaluation_line(config, plan, splits, encoder)
    return [str(resume_from or ""), notes, hashes, survey(splits["train"], encoder)["longest"]]


def set_up(config: Config, source: str) -> Run | None:
    """From a config to a run at its first step, or at the step it was stopped. None: it is complete already.

    Everything that can be wrong is found before weights load. All ranks: contains all_gathers and all_reduces."""
    stop = StopSignal()
    encoder, named = open_data(config, source)
    ranks = start_ranks(config.deterministic)
    stop.ranks_have_met()
    splits = in_turns(ranks, lambda: load_splits(config, named))
    if len(set(ranks.gather([splits["train"].sha256]))) > 1:
        raise UserError(f"data.train ({config.data.train}) is not the same file on all nodes, or is being written")
    plan = make_plan(config, splits["train"], encoder, ranks.world_size)
    output = Path(config.output_dir)
    lock = all_or_raise(ranks, lambda: OutputLock(output) if ranks.is_first else None)
    start = all_or_raise(ranks, lambda: find_start(config, encoder, splits, plan) if ranks.is_first else None)
    resume_from, notes, hashes, longest = ranks.gather([start] if ranks.is_first else [])[0]
    state = checkpoint.read_state(Path(resume_from)) if resume_from else TrainerState()
    state.input_hashes = hashes
    on = scored(config, encoder, splits)
    if state.best_score and state.best_of not in ("", on):
        state.best_step = state.best_score = None
        notes.append("The best so far was chosen on another val, or another eval_max_samples: it is chosen anew")
    state.best_of = on
    if ranks.any(ranks.is_first and checkpoint.has_lost_best(state, resume_from, output)):
        state.best_step = state.best_score = None
        notes.append("The best checkpoint so far is not in this folder: the best is chosen anew")
    if state.step == plan.total_steps and checkpoint.is_final(output):
        if ranks.is_first:
            print(f"{config.experiment}: already complete at step {state.step}; the model is in {output}", flush=True)
        stop_ranks()
        return None
    log = all_or_raise(ranks, lambda: open_log(config, ranks, state.step, state.evaluation_due))
    if stopped_before_training(ranks, stop, log, state.step, output):
        return None

    started = time.perf_counter()
    with out_of_memory_is_said("the weights of the model", config):
        model, loss = load_model(config, encoder, ranks)
    trainable = modeling.trainable_parameters(model)
    if config.init_adapter and not resume_from:
        notes.append(checkpoint.load_initial(model, config.init_adapter, config))
    on_gpu = ranks.device.type == "cuda"
    # One kernel reads and writes each number once; without it, all tensors at once take 15 GB more for a 7B on 2 GPUs.
    kernels = {"fused": True} if on_gpu else {"foreach": None if config.parallel == "ddp" else False}
    groups = modeling.optimizer_groups(model, config)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8, **kernels)
    peak_rates = [group["lr"] for group in optimizer.param_groups]
    if resume_from:
        with out_of_memory_is_said("the state of the optimizer", config):
            checkpoint.resume(Path(resume_from), model, optimizer, trainable, config)
    if config.parallel == "ddp":
        check_same_start(trainable, ranks)
    notes.append(all_or_raise(ranks, lambda: modeling.compile_layers(model, config, ranks.device)))
    state.pass_tokens, told = pass_budget(config, state, splits["train"], longest, encoder, ranks)
    state.device = " and ".join(sorted(set(ranks.gather([device_name(ranks.device)]))))
    notes += told
    seconds = time.perf_counter() - started
    ready = f"Model {config.model_name} ({encoder.family.model_type}), ready in {seconds:.1f} s; commit {git_commit()}"
    kept = records(encoder.family, config)
    if base := all_or_raise(ranks, lambda: fingerprint(config.model_name) if ranks.is_first else None):
        kept[checkpoint.BASE_FILE] = base
    trained = (model, loss, trainable, optimizer, peak_rates)
    run = Run(config, encoder, splits, plan, ranks, stop, log, state, *trained, kept, lock)
    if stopped_before_training(ranks, stop, log, state.step, output):
        return None
    moments = 0 if resume_from else sum(8 * sharding.local_part(p).numel() for p in trainable.values())
    state.pass_tokens, told = try_largest_passes(
        loss, splits["train"], longest, encoder, state.pass_tokens, moments, ranks, run.autocast
    )
    all_or_raise(ranks, lambda: describe(run, resume_from, ready, [*notes, *told]))
    return run


def stopped_before_training(ranks: Ranks, stop: StopSignal, log: RunLog, step: int, output: Path) -> bool:
    """Whether any rank was asked to stop while the run was set up; then this ends it, as `finish` does. All ranks:
    contains all_reduces."""
    if not ranks.any(stop.requested):
        return False
    mark_stopped(ranks, stop, step, output)
    log.say(f"Stopped at step {step}, before training, on request; the same command goes on from here")
    log.close()
    stop_ranks()
    return True


def mark_stopped(ranks: Ranks, stop: StopSignal, step: int, output: Path) -> None:
    """Leave the mark of a run that goes on later. All ranks: contains an all_gather."""

    def mark() -> None:
        with full_disk_is_said(output / checkpoint.MARKER):
            name = stop.name if stop.requested else "that of another rank"
            write_json(output / checkpoint.MARKER, {"step": step, "signal": name})

    all_or_raise(ranks, lambda: ranks.is_first and mark())


def open_log(config: Config, ranks: Ranks, step: int, evaluation_due: bool) -> RunLog:
    """The log of a run that starts or goes on. Raises: `UserError` where the folder cannot be written."""
    output = Path(config.output_dir)
    with full_disk_is_said(output / "log.jsonl"):
        log = RunLog(config, ranks, step, evaluation_due)
        if ranks.is_first:
            (output / checkpoint.MARKER).unlink(missing_ok=True)
            write_text(output / "config.yaml", to_yaml(config))
    return log


def load_model(config: Config, encoder: SampleEncoder, ranks: Ranks) -> tuple[torch.nn.Module, torch.nn.Module]:
    """The base with what is trained on top, and its loss module, on this rank's device. All ranks: contains all_gathers
    under fsdp."""
    dtype = torch.bfloat16 if ranks.device.type == "cuda" else torch.float32
    base = modeling.load_base(config.model_name, dtype, config.quantization)
    if encoder.task.HAS_HEAD:
        classification.attach_head(base, config.num_labels, config.seed)
    model = modeling.prepare_training(base, config)
    loss = classification.make_loss(model, encoder.family, config)
    if config.parallel == "fsdp":
        sharding.shard(loss, ranks)
    else:
        loss.to(ranks.device)
    return model, loss


def describe(run: Run, resume_from: str, ready: str, notes: list[str]) -> None:
    """The head of the log: sizes, trainable parameters per group, batch arithmetic; samples to TensorBoard."""
    config, log, train_samples, encoder = run.config, run.log, run.splits["train"], run.encoder
    log.say("✓ TF32 enabled" if run.ranks.device.type == "cuda" else "✓ float32 on CPU")
    log.say(run.ranks.describe())
    log.say(describe_images(config, encoder.family))
    log.say(config.experiment)
    log.say(ready)
    world_size = run.ranks.world_size
    arithmetic = batch_arithmetic(config, run.plan, world_size, run.state.pass_tokens)
    arithmetic += prefix_sharing(config, run.plan, train_samples, encoder)
    told = recurrent.notes(run.encoder.family, run.ranks.device)
    for line in [*modeling.parameter_table(run.model), *arithmetic, *classification.notes(config), *told, *notes]:
        log.say(line)
    if resume_from:
        log.say(f"Resuming from {resume_from}: step {run.state.step}/{run.plan.total_steps}")
    elif run.ranks.is_first:
        for row in range(min(SAMPLES_ON_TENSORBOARD, len(train_samples))):
            log.sample(row, *images_and_text(train_samples[row], encoder))


# ----------------------------------------------------------------------------------------------------- the step


def training_step(run: Run, passes: list[dict], answer_tokens: int, waited: float) -> dict:
    """One optimizer step over this rank's passes. All ranks: contains all_reduces.

    The loss is the mean over the supervised tokens of the whole step, on all ranks: each pass adds
    sum_nll / answer_tokens of the step, and the gradients are added up over the ranks. The host waits for the GPU
    twice: for the sums over the ranks, and for the gradient's norm.
    answer_tokens: supervised, on all ranks. waited: seconds for the data, on this rank. Returns nll, answer_tokens,
    tokens (laid out) of the step over all ranks, waited (mean), grad_norm, learning_rates, finite (where not, nothing
    was updated), stop (whether any rank was asked to).
    """
    config, ranks, step = run.config, run.ranks, run.state.step
    torch.manual_seed(((config.seed * 1_000_003 + step) * 4_099 + ranks.rank) % 2**63)  # dropout
    largest = max(passes, key=lambda batch: batch["input_ids"].numel())
    with out_of_memory_is_said(f"a pass of step {step + 1}", config, largest):
        nll = backward(run.loss, passes, answer_tokens, ranks, config.parallel, run.autocast)
    tokens = sum(batch["tokens"] for batch in passes)
    has_gradient = [parameter.grad is not None for parameter in run.trainable.values()]
    sums = ranks.sum(nll, tokens, run.stop.requested, waited, *has_gradient)
    total_nll, total_tokens, stop_wanted, total_waited, *present = sums
    if config.parallel == "ddp" and ranks.world_size > 1:
        sum_gradients(run.trainable, [count > 0 for count in present])
    grad_norm = torch.nn.utils.clip_grad_norm_(run.trainable.values(), config.max_grad_norm)
    grad_norm = float(sharding.full_tensor(grad_norm))
    finite = math.isfinite(total_nll) and math.isfinite(grad_norm)  # the same numbers on all ranks
    factor = learning_rate_factor(config.lr_scheduler_type, step, config.warmup_steps, run.plan.total_steps)
    for group, peak in zip(run.optimizer.param_groups, run.peak_rates, strict=True):
        group["lr"] = peak * factor
    if finite:
        with out_of_memory_is_said("the state of the optimizer", config):  # AdamW makes it at its first step
            run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    run.state.step += 1
    run.state.nonfinite_in_a_row = 0 if finite else run.state.nonfinite_in_a_row + 1
    return {
        "nll": total_nll,
        "own_nll": nll,
        "answer_tokens": answer_tokens,
        "tokens": total_tokens,
        "waited": total_waited / ranks.world_size,
        "grad_norm": grad_norm,
        "learning_rates": [group["lr"] for group in run.optimizer.param_groups],
        "finite": finite,
        "stop": bool(stop_wanted),
    }


def backward(loss, passes: list[dict], answer_tokens: int, ranks: Ranks, parallel: str, autocast) -> torch.Tensor:
    """Forward and backward over this rank's passes of one step. answer_tokens: the step's, on all ranks.

    Returns the summed negative log-likelihood of this rank, float64 on the device."""
    scale = (ranks.world_size if parallel == "fsdp" else 1) / answer_tokens  # FSDP averages the gradients of the ranks
    nll = torch.zeros((), dtype=torch.float64, device=ranks.device)
    for batch in passes:
        with autocast():
            batch_nll = loss(modeling.to_device(batch, ranks.device))
            (batch_nll * scale).backward()
        nll += batch_nll.detach()
    return nll


# ------------------------------------------------------------------------------------------------- once in a while


def report_nonfinite(run: Run, step: dict, passes: list[dict]) -> None:
    """All ranks: contains an all_gather. Raises: `UserError` after several in a row."""
    concerned = [] if step["own_nll"].isfinite() else [name for batch in passes for name in batch["sample_ids"]]
    ids, number = run.ranks.gather(concerned), run.state.step
    run.log.say(
        f"step {number}: loss {step['nll'] / step['answer_tokens']}, grad_norm {step['grad_norm']}: not finite, no "
        f"update. Samples of the ranks concerned: {', '.join(ids) or 'none (the gradient overflowed)'}"
    )
    if run.state.nonfinite_in_a_row >= MAX_NONFINITE_STEPS:
        raise UserError(
            f"{MAX_NONFINITE_STEPS} steps in a row without a finite loss, the last at step {number}; lower "
            "learning_rate or look at the samples named above. The checkpoint before is intact"
        )


def log_interval(run: Run, meter: Meter, step: dict) -> None:
    """All ranks: contains an all_gather."""
    interval, rates = meter.interval(), step["learning_rates"]
    values = {
        "step": run.state.step,
        "epoch": run.plan.epoch_at(run.state.step),
        "loss": interval.pop("loss"),
        "grad_norm": step["grad_norm"],
        "learning_rate": rates[0],
        **classification.logged_rates(run.config, rates),
        **interval,
        "memory_gb": memory_gb(run.ranks.device),
    }
    all_or_raise(run.ranks, lambda: run.log.record(values, "train"))
    eta = (run.plan.total_steps - run.state.step) * values["seconds_per_step"]
    run.log.say(step_line(values, run.plan.total_steps, eta, counted(run.config)))


def evaluate(run: Run) -> None:
    """All ranks: contains all_reduces. Raises: `Stopped`."""
    state, task = run.state, run.encoder.task
    state.evaluation_due = True
    began = time.perf_counter()
    run.model.eval()
    with sharding.unsharded(run.loss), run.autocast(), modeling.uncompiled(run.model):
        values = scores_while_training(
            run.loss, run.splits, run.encoder, run.ranks, lambda: run.stop.requested, run.is_done
        )
    run.model.train()
    state.evaluation_due = False
    values["eval_seconds"] = time.perf_counter() - began
    record = {"step": state.step, "epoch": run.plan.epoch_at(state.step), **values}
    all_or_raise(run.ranks, lambda: run.log.record(record, "eval"))
    told = {key.removeprefix("eval_"): value if type(value) is int else f"{value:.4f}" for key, value in values.items()}
    run.log.say("eval " + " | ".join(f"{key} {value}" for key, value in told.items()))
    # The best is only worth keeping where there is a checkpoint of it. Where it is the result, one is made.
    saved = run.is_due(run.config.save_steps) or run.is_done
    score = task.selection_score(values)
    finite = all(map(math.isfinite, score))
    if not finite:
        run.log.say(f"The evaluation of step {state.step} is not finite: it is never the best")
    if finite and (state.best_score is None or score > state.best_score) and (saved or task.BEST_IS_RESULT):
        state.best_score, state.best_step = score, state.step


def save(run: Run, trained: list, reason: str = "") -> None:
    """trained: what `RunLog.order` takes, since the last save. All ranks: contains all_gathers and all_reduces."""
    everyones = run.ranks.gather(trained)
    all_or_raise(run.ranks, lambda: run.log.order(everyones))
    trained.clear()
    run.state.config, run.state.global_batch, run.state.ranks = (
        to_dict(run.config),
        run.plan.batch,
        run.ranks.world_size,
    )
    run.state.train_data = run.splits["train"].sha256
    size, seconds = checkpoint.save(
        run.output, run.model, run.optimizer, run.trainable, run.state, run.config, run.records, run.ranks
    )
    name = f"checkpoint-{run.state.step}"
    told = f"Saved {name} ({size / 1e6:.1f} MB in {seconds:.2f} s)" if size else f"{name} is there already"
    run.log.say(told + reason)
    if run.ranks.is_first:
        rotate(run.output, run.config.save_total_limit, run.state.best_step, run.state.step)


# ----------------------------------------------------------------------------------------------------- the loop


def train(config: Config, source: str) -> None:
    run = set_up(config, source)
    if run is None:
        return
    state, plan, ranks = run.state, run.plan, run.ranks
    dataset = StepDataset(
        run.splits["train"], run.encoder, config.share_prefix, plan, state.pass_tokens, ranks.rank, ranks.world_size
    )
    steps = load(dataset, range(state.step, plan.total_steps), config.dataloader_num_workers, ranks.device)
    meter = Meter(state.interval)
    first_step = state.step + 1
    trained: list = []  # [step, [[place in the step, sample id], ...] of this rank], until written out
    stopped = False
    run.model.train()
    try:
        if state.evaluation_due:
            evaluate(run)
            if run.encoder.task.BEST_IS_RESULT and state.best_step == state.step:
                save(run, trained)  # where the folder it was resumed from is another one
        while not run.is_done and not stopped:
            # ---- the training step ----
            began = time.perf_counter()
            loaded = next(steps)
            passes, waited = loaded["passes"], time.perf_counter() - began
            if config.parallel == "fsdp":
                passes = sharding.pad_passes(passes, ranks)
            step = training_step(run, passes, loaded["answer_tokens"], waited)
            state.train_seconds += time.perf_counter() - began
            trained.append([state.step, loaded["sample_ids"]])
            meter.add(step, len(plan.questions(state.step - 1)))
            if state.step == first_step and (forms := modeling.compiled_so_far())[0]:
                run.log.say("Compiled {} forms of a decoder layer in {:.1f} s so far".format(*forms))

            # ---- once in a while: a loss that is not finite ----
            if not step["finite"]:
                report_nonfinite(run, step, passes)

            # ---- once in a while: log ----
            if (run.is_due(config.logging_steps) or run.is_done) and meter.has_loss:
                log_interval(run, meter, step)
            state.interval = meter.sums

            # ---- once in a while: evaluate, save, stop ----
            with meter.paused():
                if config.eval_steps and (run.is_due(config.eval_steps) or run.is_done):
                    evaluate(run)
                is_best = run.encoder.task.BEST_IS_RESULT and state.best_step == state.step
                if run.is_due(config.save_steps) or run.is_done or is_best:
                    save(run, trained)
                elif step["stop"]:
                    save(run, trained, " before stopping")
            stopped = step["stop"] and not run.is_done
    except Stopped:
        stopped = True
        save(run, trained, " before stopping, its evaluation still due")
    finish(run, stopped)


def finish(run: Run, stopped: bool) -> None:
    """The final save, or the mark of a run that goes on later. All ranks: contains all_gathers under fsdp."""
    config, state, log, ranks = run.config, run.state, run.log, run.ranks
    if stopped:
        mark_stopped(ranks, run.stop, state.step, run.output)
        log.say(f"Stopped at step {state.step}/{run.plan.total_steps} on request; the same command goes on from here")
    else:
        if run.encoder.task.BEST_IS_RESULT and state.best_step not in (None, state.step):
            checkpoint.load_best(run.output / f"checkpoint-{state.best_step}", run.model, run.trainable, config)
            log.say(f"The best on val was step {state.best_step}, accuracy {state.best_score[0]:.4f}: it is the result")
        checkpoint.save_final(run.output, run.model, config, run.records, ranks)
        minutes = state.train_seconds / 60
        log.say(f"Done: {run.plan.total_steps} steps in {minutes:.1f} min of training; the model is in {run.output}")
    log.close()
    ranks.barrier()
    stop_ranks()


def check(config: Config, source: str, tflops: float) -> None:
    """--check: everything that can be found without training, by the first rank alone."""
    if os.environ.get("RANK", "0") != "0":
        return
    encoder, named = open_data(config, source)
    check_record(config.init_adapter, encoder.family, config)
    check_initial(config)
    full_check(config, load_splits(config, named), encoder, int(os.environ.get("WORLD_SIZE", "1")), tflops)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--check", action="store_true", help="validate everything and exit without training")
    parser.add_argument("--tflops", type=float, default=400, metavar="RATE",
                        help="with --check: 10¹² operations a second of a GPU (default: %(default)s)")  # fmt: skip
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override any config key, e.g. lora.r=32")
    args = parser.parse_intermixed_args(arguments)
    if not args.tflops > 0:
        raise UserError(f"--tflops {args.tflops:g}: give the rate of a GPU, more than 0")
    config = load_config(args.config, args.overrides)
    check(config, args.config, args.tflops) if args.check else train(config, args.config)


if __name__ == "__main__":
    run_command(main)
