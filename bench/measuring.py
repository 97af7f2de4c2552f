"""Time and memory of a step, and how far two sets of gradients are apart."""

import contextlib
import ctypes
import gc
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch


class PeakMemory:
    """Peak memory of a block above what was held before it, in GB: of the CUDA allocator, or of the process (Linux)."""

    def __init__(self, device: torch.device):
        self.on_gpu, self.gigabytes = device.type == "cuda", float("nan")

    def __enter__(self):
        gc.collect()
        if self.on_gpu:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
            return self
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL("libc.so.6").malloc_trim(0)  # or what the step before left behind would hide the peak
            Path("/proc/self/clear_refs").write_text("5")  # sets the peak to the present size
        self._before = self._status("VmRSS")
        return self

    def __exit__(self, *exception):
        peak = torch.cuda.max_memory_allocated() if self.on_gpu else self._status("VmHWM")
        self.gigabytes = (peak - self._before) / 1e9

    @staticmethod
    def _status(field_name: str) -> float:
        with contextlib.suppress(OSError):
            for line in Path("/proc/self/status").read_text().splitlines():
                if line.startswith(field_name):
                    return int(line.split()[1]) * 1024
        return float("nan")


@dataclass
class Measured:
    """Of one variant; lists over the timed steps."""

    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    peak_gb: float = 0.0
    gradient_difference: float | None = None
    loss: float = float("nan")
    failure: str = ""


def measure_step(run, result: Measured, device: torch.device, memory: bool) -> None:
    """One step's time, or its peak memory (for which the heap is given back first: taking it again costs time)."""
    if memory:
        with PeakMemory(device) as peak:
            run.step()
        result.peak_gb = peak.gigabytes
        return
    if device.type == "cuda":
        torch.cuda.synchronize()
    began, cpu_began = time.perf_counter(), time.process_time()
    run.step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    result.seconds.append(time.perf_counter() - began)
    result.cpu_seconds.append(time.process_time() - cpu_began)


def largest_difference(gradients: dict, reference: dict) -> float:
    """Largest relative difference of a LoRA tensor's gradient, in the Euclidean norm."""
    assert gradients.keys() == reference.keys()
    norm = torch.linalg.vector_norm
    tensors = ((torch.from_numpy(gradients[name]), torch.from_numpy(reference[name])) for name in reference)
    return float(torch.stack([norm(a - b) / norm(b) for a, b in tensors]).max())  # Python's max() would lose a NaN
