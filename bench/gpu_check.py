"""python bench/gpu_check.py [--size 8b] [--out gpu_check.json]

What this machine's GPU gives, and whether what is proved on CPUs holds on it: about seven minutes on one H100 or H200
(80 GB), with random weights and drawn images. Prints a table with a verdict for each line and the minutes that the
shipped experiments would take, and writes the same as JSON. A line that fails does not end the others. Without a GPU it
is a dry run (--size tiny): every line runs, and its numbers mean nothing.
"""

import os

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts; of the deterministic line

import argparse
import copy
import hashlib
import json
import shutil
import statistics
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the modules at the root

import workload as work

import attention
import recurrent
from attention import SharedRows, attention_mask, heads_together
from batches import BatchPlan
from config import Lora
from dataset import EvalDataset, StepDataset
from errors import exit_on_user_error
from files import write_json
from inference import greedy
from model import AnswerLoss, _compiler_fails, compiled_so_far, text_layers, to_device, trainable_parameters

TOLERANCE = 2e-2  # relative, of bfloat16 against float32
COMPILED_ERROR = 1.5  # times that of uncompiled layers: both round to bfloat16, at other places
MATRIX_TFLOPS, COPY_TB = {"H100": 770, "H200": 770}, {"H100": 2.9, "H200": 4.2}  # what a healthy one reaches
SHARE_OF_PEAK, PEAK_TFLOPS = 0.50, 790  # aim for a compiled pass; a large bfloat16 product on an H100
PASS_TOKENS = (1024, 2048, 4096, 8192)
QUESTIONS = work.EPOCHS * work.QUESTIONS_IN_TRAINING
# title -> (image tokens, padded tokens a question: counted by bench/layout.py, minutes that are the aim on one H100)
SHIPPED = {
    "exp2's order": (576, 229, 40),
    "exp2 with order: images": (576, 116, 25),
    "exp1 at 2,900 image tokens": (2900, 2924, 140),
    "exp1 at 2,900, order: images": (2900, 537, 90),
}
KINDS = {  # of kernels, by what their names hold; the first that fits
    "attention": ("flash", "fmha", "attention", "mem_eff"),
    "matrices": ("gemm", "cutlass", "nvjet", "cublas", "xmma", "aten::mm", "aten::addmm"),
    "copies": ("memcpy", "memset", "aten::copy_"),
}


@dataclass
class Line:
    """What one check has found. verdict: ok, below the aim, wrong, not measured, or failed: why."""

    name: str
    measured: str
    wanted: str = ""
    verdict: str = "ok"
    values: dict = field(default_factory=dict)


def judged(holds: bool, otherwise: str) -> str:
    return "ok" if holds else otherwise


class Machine:
    """The device, and the model's passes on it."""

    def __init__(self, size: str, folder: Path, seed: int = 0):
        self.on_gpu = torch.cuda.is_available()
        self.device = torch.device("cuda" if self.on_gpu else "cpu")
        self.name = torch.cuda.get_device_name() if self.on_gpu else "CPU (a dry run)"
        self.folder, self.seed, self.size = folder, seed, size
        self.model_folder = work.write_folder(folder / "model", work.SIZES[size], None)
        self.base = work.build_base(self.model_folder, self.device, seed)
        self.operations = work.operations_of(self.model_folder)
        self.tokens_per_second: dict[int, float] = {}  # by image tokens, of compiled layers where they compile
        self._loads: dict[int, work.Workload] = {}

    @property
    def kind(self) -> str:
        return next((kind for kind in MATRIX_TFLOPS if kind in self.name), "")

    def workload(self, image_tokens: int) -> work.Workload:
        if image_tokens not in self._loads:
            images = work.questions_of_step("real", work.REAL_HISTOGRAM, 12 if image_tokens < 1000 else 4)
            lora, data = Lora(16, 32, 0.05), self.folder / f"data-{image_tokens}"
            tokens = image_tokens if self.on_gpu else 16
            self._loads[image_tokens] = work.make_workload(self.model_folder, data, images, tokens, 1, lora, self.seed)
        return self._loads[image_tokens]

    def batch(self, image_tokens: int, pass_tokens: int) -> dict:
        """The largest pass within the budget, on the device."""
        load = self.workload(image_tokens)
        plan = BatchPlan(len(load.samples), len(load.samples), 1, "sequential", 0)
        dataset = StepDataset(load.samples, load.encoder, True, plan, pass_tokens if self.on_gpu else 256, 0, 1)
        largest = max(dataset[0]["passes"], key=lambda batch: batch["input_ids"].numel())
        pinned = {k: v.pin_memory() if self.on_gpu and torch.is_tensor(v) else v for k, v in largest.items()}
        return to_device(pinned, self.device)

    def four_layers(self) -> torch.nn.Module:
        """As wide as the model, and small enough to be computed in float32 beside it; its weights are in bfloat16."""
        folder = work.write_folder(self.folder / "four", work.SIZES[self.size] | {"layers": 4}, None)
        return work.build_base(folder, self.device, self.seed).to(torch.bfloat16)

    def loss(self, dropout: float = 0.0, compiled: bool = False, base: torch.nn.Module | None = None) -> AnswerLoss:
        load = self.workload(576)
        model = work.adapted(base or self.base, Lora(16, 32, dropout), self.seed, stock=False).train()
        for layer in text_layers(model) if compiled else ():
            layer.compile(dynamic=True, backend="inductor" if self.on_gpu else "eager")  # the first: minutes on a CPU
        return AnswerLoss(model, load.family)

    def wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()

    def seconds(self, action: Callable[[], object], repeats: int = 5) -> float:
        """Median of some calls, after one to warm up."""
        action()
        found = []
        for _ in range(repeats if self.on_gpu else 1):
            self.wait()
            began = time.perf_counter()
            action()
            self.wait()
            found.append(time.perf_counter() - began)
        return statistics.median(found)

    def useful(self, batch: dict) -> float:
        """Operations that a pass needs, from its shapes."""
        rows = [sorted(Counter(s for s in row if s >= 0).items()) for row in batch["segments"].tolist()]
        images = [h * w // 4 for _, h, w in batch["image_grid_thw"].tolist()]
        return self.operations.useful([[n for _, n in row] for row in rows], len(batch["supervised"]), images)


def forward_backward(loss: AnswerLoss, batch: dict) -> torch.Tensor:
    loss.zero_grad(set_to_none=True)
    value = loss(batch)
    value.backward()
    return value.detach()


def gradients(loss: AnswerLoss, batch: dict) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)  # dropout
    value = forward_backward(loss, batch)
    return {"loss": value} | {name: p.grad.clone() for name, p in trainable_parameters(loss.model).items()}


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30))


def worst(differences: Iterable[float]) -> float:
    """NaN where any is; Python's max drops one that does not come first."""
    return float(torch.tensor(list(differences)).max())


# ------------------------------------------------------------------------------------------------------------ the lines


def matrices(machine: Machine) -> Line:
    rate = work.matrix_rate(machine.device) / 1e12
    least = MATRIX_TFLOPS.get(machine.kind, 0)
    wanted = f"≥ {least} TFLOP/s" if least else ""
    return Line("matrix product", f"{rate:.3g} TFLOP/s", wanted, judged(rate >= least, "below"), {"tflops": rate})


def bandwidth(machine: Machine) -> Line:
    source = torch.empty(2**30 if machine.on_gpu else 2**20, dtype=torch.uint8, device=machine.device)
    target = torch.empty_like(source)
    rate = 2 * source.numel() / machine.seconds(lambda: target.copy_(source)) / 1e12
    least = COPY_TB.get(machine.kind, 0)
    wanted = f"≥ {least} TB/s" if least else ""
    return Line("copy", f"{rate:.3g} TB/s", wanted, judged(rate >= least, "below"), {"tb_per_second": rate})


def attention_paths(machine: Machine) -> list[Line]:
    """Outputs and gradients in bfloat16 against the mask path in float32."""
    heads, keys, size = (32, 8, 128) if machine.on_gpu else (4, 2, 16)
    lines = []
    for path in ("two_part", "varlen") if machine.on_gpu else ("two_part",):
        differences = {}
        for rows, prefix in ((1, 576), (4, 576), (1, 2900), (4, 2900)) if machine.on_gpu else ((1, 40), (2, 40)):
            length = prefix + 9 * 48
            segments = torch.zeros(rows, length, dtype=torch.int32, device=machine.device)
            segments[:, prefix:] = torch.arange(9 * 48, device=machine.device) // 48 + 1
            mask = attention_mask(segments)
            torch.manual_seed(0)
            inputs = [torch.randn(rows, n, length, size, device=machine.device) for n in (heads, keys, keys)]
            results = []
            for dtype in (torch.float32, torch.bfloat16):
                q, k, v = (x.to(torch.bfloat16).to(dtype).requires_grad_() for x in inputs)
                if dtype == torch.float32:
                    wide = (x.repeat_interleave(heads // keys, dim=1) for x in (k, v))
                    out = F.scaled_dot_product_attention(q, *wide, attn_mask=mask, scale=size**-0.5)
                elif path == "varlen":
                    out = attention.varlen(q, k, v, attention.varlen_layout(segments), size**-0.5)
                else:
                    groups = heads_together(machine.device, heads, keys)
                    shared = SharedRows(segments, mask, prefix, dtype, groups)
                    out = attention.two_part(q, k, v, shared.bias, size**-0.5)
                out.float().square().sum().backward()
                results.append([x.float() for x in (out.detach(), q.grad, k.grad, v.grad)])
            differences[f"{rows} × {prefix}"] = worst(relative(b, a) for a, b in zip(*results, strict=True))
        most = worst(differences.values())
        verdict = judged(most < TOLERANCE, "wrong")
        lines.append(Line(f"attention: {path}", f"differs by {most:.1e}", f"< {TOLERANCE:.0e}", verdict, differences))
    return lines


def packed_questions(machine: Machine) -> Line:
    """Qwen3.5's rule in flash-linear-attention's kernels against PyTorch's own, outputs, states and gradients."""
    name = "Qwen3.5: packed questions"
    if not machine.on_gpu or recurrent.KERNELS["fla"] in recurrent.missing_kernels():
        return Line(name, f"{recurrent.KERNELS['fla']} is not here: PyTorch's own rule runs", "", "not measured")
    difference = recurrent.packed_difference(machine.device)
    verdict = judged(difference < TOLERANCE, "wrong")
    return Line(name, f"differs by {difference:.1e}", f"< {TOLERANCE:.0e}", verdict, {"difference": difference})


def compiled_layers(machine: Machine) -> Line:
    """How far compiled and uncompiled layers in bfloat16 are from float32: the worst of the loss and all gradients."""
    if machine.on_gpu and (reason := _compiler_fails(machine.device)):
        return Line("compiled layers", reason, "", "not measured")
    batch, base = machine.batch(576, 4096), machine.four_layers()
    torch.set_float32_matmul_precision("highest")
    expected = gradients(machine.loss(base=copy.deepcopy(base).float()), batch)
    torch.set_float32_matmul_precision("high")
    errors = {}
    for name in ("uncompiled", "compiled"):
        found = gradients(machine.loss(base=base, compiled=name == "compiled"), batch)
        errors[name] = worst(relative(found[tensor], expected[tensor]) for tensor in expected)
    forms, seconds = compiled_so_far()
    shown = " and ".join(f"{error:.1e} ({name})" for name, error in errors.items())
    measured = f"{shown} from float32; {forms} forms in {seconds:.0f} s"
    verdict = judged(errors["compiled"] <= COMPILED_ERROR * errors["uncompiled"], "wrong")
    values = {**errors, "forms": forms, "seconds": seconds}
    return Line("compiled layers", measured, f"≤ {COMPILED_ERROR} × uncompiled", verdict, values)


def profiled_pass(machine: Machine) -> Line:
    """Shares of the kernels' time; a kernel of SDPA's math path would show as a softmax of its own."""
    from torch.profiler import ProfilerActivity, profile

    loss, batch = machine.loss(dropout=0.05), machine.batch(576, 4096)
    forward_backward(loss, batch)
    with profile(activities=[ProfilerActivity.CUDA if machine.on_gpu else ProfilerActivity.CPU]) as profiled:
        forward_backward(loss, batch)
        machine.wait()
    times, names = Counter(), Counter()
    for event in profiled.key_averages():
        taken = event.self_device_time_total if machine.on_gpu else event.self_cpu_time_total
        kind = next(
            (kind for kind, parts in KINDS.items() if any(p in event.key.lower() for p in parts)), "elementwise"
        )
        times[kind] += taken
        names[event.key] += taken
    total = sum(times.values()) or 1
    shares = {kind: taken / total for kind, taken in times.most_common()}
    math_kernel = [name for name in names if machine.on_gpu and "softmax" in name.lower() and "log" not in name.lower()]
    measured = ", ".join(f"{kind} {share:.0%}" for kind, share in shares.items())
    values = {"shares": shares, "kernels": dict(names.most_common(25)), "math_kernels": math_kernel}
    verdict = judged(not math_kernel, f"wrong: {math_kernel[0][:40]}" if math_kernel else "")
    return Line("one eager pass", measured, "no math attention", verdict, values)


def waits(machine: Machine) -> Line:
    """How often the host waits for the GPU in a pass, as CUDA itself tells it."""
    if not machine.on_gpu:
        return Line("waits in a pass", "tests/test_waits.py counts them on a CPU", "≤ 3", "not measured")
    loss, batch = machine.loss(), machine.batch(576, 4096)
    forward_backward(loss, batch)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            forward_backward(loss, batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    places = Counter(f"{Path(w.filename).name}:{w.lineno}" for w in told if "synchroniz" in str(w.message))
    count = sum(places.values())
    return Line("waits in a pass", str(count), "≤ 3", judged(count <= 3, "too many"), dict(places))


def pass_sizes(machine: Machine) -> list[Line]:
    """Speed, share of peak and memory of passes, eager and compiled."""
    lines = []
    compiles = machine.on_gpu and _compiler_fails(machine.device) is None
    for compiled in (False, True) if compiles else (False,):
        loss = machine.loss(dropout=0.05, compiled=compiled)
        for image_tokens, budgets in ((576, PASS_TOKENS if machine.on_gpu else (4096,)), (2900, (4096,))):
            for budget in budgets:
                title = f"pass of {budget:,}, images of {image_tokens:,}, {'compiled' if compiled else 'eager'}"
                try:
                    lines.append(_pass(machine, loss, title, image_tokens, budget))
                except torch.OutOfMemoryError:
                    lines.append(Line(title, "out of memory", "", "not measured"))
                    torch.cuda.empty_cache()
                else:
                    if budget == 4096:
                        machine.tokens_per_second[image_tokens] = lines[-1].values["tokens_per_second"]
    return lines


def _pass(machine: Machine, loss: AnswerLoss, title: str, image_tokens: int, budget: int) -> Line:
    batch = machine.batch(image_tokens, budget)
    if machine.on_gpu:
        torch.cuda.reset_peak_memory_stats()
    seconds = machine.seconds(lambda: forward_backward(loss, batch))
    peak = torch.cuda.max_memory_allocated() / 1e9 if machine.on_gpu else 0.0
    rate, tflops = batch["input_ids"].numel() / seconds, machine.useful(batch) / seconds / 1e12
    share = tflops / PEAK_TFLOPS
    aimed = machine.kind and "compiled" in title and budget == 4096
    measured = f"{rate:,.0f} tokens/s, {tflops:.3g} TFLOP/s ({share:.0%}), peak {peak:.1f} GB"
    values = {"tokens_per_second": rate, "tflops": tflops, "seconds": seconds, "peak_gb": peak}
    wanted = f"≥ {SHARE_OF_PEAK:.0%} of {PEAK_TFLOPS}" if aimed else ""
    return Line(title, measured, wanted, judged(not aimed or share >= SHARE_OF_PEAK, "below the aim"), values)


def determinism(machine: Machine) -> list[Line]:
    """The same pass twice, dropout on: SHA-256 of the loss and every gradient."""
    lines = []
    for strict in (False, True):
        torch.use_deterministic_algorithms(strict)
        torch.utils.deterministic.fill_uninitialized_memory = False
        try:
            loss, batch = machine.loss(dropout=0.05), machine.batch(576, 4096)
            hashes = {_sha256(gradients(loss, batch)) for _ in range(3)}
            seconds = machine.seconds(lambda: forward_backward(loss, batch), repeats=2)  # noqa: B023
        finally:
            torch.use_deterministic_algorithms(False)
        same = "the same bits" if len(hashes) == 1 else f"{len(hashes)} results of 3"
        name = f"the same pass again, {'deterministic: true' if strict else 'by default'}"
        verdict = judged(len(hashes) == 1 or not strict, "wrong")
        wanted = "the same bits" if strict else ""
        lines.append(Line(name, f"{same}, {seconds:.2f} s", wanted, verdict, {"results": len(hashes)}))
    return lines


def _sha256(tensors: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(tensors[name].double().cpu().numpy().tobytes())
    return digest.hexdigest()


def answers(machine: Machine) -> Line:
    """Questions a second with 24 tokens each: random weights hardly ever end an answer, so that nothing leaves."""
    load, model = machine.workload(576), machine.loss().model.eval()
    dataset = EvalDataset(load.samples, load.encoder, True, None if machine.on_gpu else 4, True)
    batch, new_tokens = to_device(dataset[0], machine.device), 24 if machine.on_gpu else 2
    seconds = machine.seconds(lambda: greedy(model, batch, load.family, {0}, new_tokens), repeats=2)
    questions = len(batch["sample_ids"])
    rate = questions / seconds
    measured = f"{rate:.3g} questions/s, {questions} together, {new_tokens} tokens each"
    verdict = judged(rate >= 150 or "H200" not in machine.name, "below the aim")
    wanted = "≥ 150 on an H200" if machine.on_gpu else ""
    return Line("answers", measured, wanted, verdict, {"questions_per_second": rate})


def ranks(machine: Machine) -> Line:
    """The sum of an 8B adapter's gradients over all GPUs, which a step waits for once."""
    count = torch.cuda.device_count() if machine.on_gpu else 1
    if count < 2:
        return Line("sum over all GPUs", "one GPU", "", "not measured")
    out = machine.folder / "ranks.json"
    torch.multiprocessing.spawn(_rank, (count, str(out)), nprocs=count)
    found = json.loads(out.read_text())
    verdict = judged(found["right"], "wrong")
    return Line("sum over all GPUs", f"{count} GPUs, {found['seconds'] * 1e3:.1f} ms a step", "right", verdict, found)


def _rank(rank: int, count: int, out: str) -> None:
    import torch.distributed as dist

    from distributed import sum_gradients

    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": os.environ.get("MASTER_PORT", "29533")}
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", rank=rank, world_size=count)
    parameter = torch.nn.Parameter(torch.zeros(43_600_000, device="cuda"))
    for _ in range(3):
        parameter.grad = torch.full_like(parameter, float(rank + 1))
        torch.cuda.synchronize()
        began = time.perf_counter()
        sum_gradients({"adapter": parameter}, [True])
        torch.cuda.synchronize()
        seconds = time.perf_counter() - began
    right = bool((parameter.grad == count * (count + 1) / 2).all())
    if rank == 0:
        write_json(Path(out), {"gpus": count, "seconds": seconds, "right": right})
    dist.destroy_process_group()


def predictions(machine: Machine) -> list[Line]:
    """Minutes of 3 epochs of 41,079 questions on one such GPU, from the measured passes of 4,096 tokens."""
    lines = []
    for title, (image_tokens, tokens, aim) in SHIPPED.items():
        rate = machine.tokens_per_second.get(image_tokens)
        if rate is None:
            lines.append(Line(f"predicted: {title}", "no pass was measured", "", "not measured"))
            continue
        minutes = QUESTIONS * tokens / rate / 60
        aimed = machine.kind == "H100"
        verdict = judged(not aimed or minutes < aim, "below the aim")
        wanted = f"< {aim} min" if machine.kind else ""
        values = {"minutes": minutes}
        lines.append(Line(f"predicted: {title}", f"{minutes:,.0f} min on one GPU", wanted, verdict, values))
    return lines


CHECKS = (
    matrices,
    bandwidth,
    attention_paths,
    packed_questions,
    compiled_layers,
    waits,
    profiled_pass,
    pass_sizes,
    determinism,
    answers,
    ranks,
    predictions,
)


def run_checks(machine: Machine, checks=CHECKS) -> list[Line]:
    lines = []
    for check in checks:
        began = time.perf_counter()
        try:
            found = check(machine)
            found = found if isinstance(found, list) else [found]
        except Exception as error:
            traceback.print_exc()
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:100]
            found = [Line(check.__name__.replace("_", " "), "", "", f"failed: {reason}")]
        if machine.on_gpu:
            torch.cuda.empty_cache()
        print(f"  {check.__name__}: {time.perf_counter() - began:.1f} s", file=sys.stderr, flush=True)
        lines += found
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="8b" if torch.cuda.is_available() else "tiny", choices=work.SIZES)
    parser.add_argument("--out", default="gpu_check.json", help="the JSON file (default: %(default)s)")
    args = parser.parse_args()
    torch.set_float32_matmul_precision("high")  # as train.py
    began, folder = time.perf_counter(), Path(tempfile.mkdtemp(prefix="bench-"))
    try:
        machine = Machine(args.size, folder)
        lines = run_checks(machine)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    minutes = (time.perf_counter() - began) / 60
    head = {"device": machine.name, "size": args.size, "torch": torch.__version__, "minutes": minutes}
    print(f"{machine.name}, {args.size}, torch {torch.__version__}: {minutes:.1f} min\n")
    print("| what | measured | wanted | verdict |\n|---|---|---|---|")
    for line in lines:
        print(f"| {line.name} | {line.measured} | {line.wanted} | {line.verdict} |")
    unwell = [line for line in lines if line.verdict.startswith(("wrong", "failed", "too many"))]
    # A number that is none (a loss of NaN) is no JSON.
    rows = json.loads(json.dumps([asdict(line) for line in lines]), parse_constant=str)
    write_json(Path(args.out), {**head, "lines": rows})
    print(f"\n{len(lines) - len(unwell)} of {len(lines)} lines without an error; all numbers are in {args.out}")


if __name__ == "__main__":
    with exit_on_user_error():
        main()
