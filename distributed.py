"""Who is who among the ranks: start the process group, add up, agree, collect, and notice a request to stop.

Every function that takes part in a collective says so; call it on all ranks or on none.
"""

import atexit
import datetime
import json
import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NoReturn

import torch
import torch.distributed as dist

from errors import UserError, exit_on_user_error

# Long enough for the slowest rank-local work (loading weights, a checkpoint of rank 0 on a slow disk), short enough
# that a lost rank ends the job while its node is still paid for.
COLLECTIVE_TIMEOUT = datetime.timedelta(minutes=int(os.environ.get("COLLECTIVE_TIMEOUT_MINUTES", "20")))


@dataclass(frozen=True)
class Ranks:
    """This process among all. `rank` counts over all nodes, `local_rank` on this node."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def sum(self, *values: float | torch.Tensor) -> list[float]:
        """Add up numbers, or scalars on the device, over the ranks, in float64; the host waits for the device once, and
        without ranks and scalars not at all. All ranks: contains an all_reduce."""
        on_device = {place: value for place, value in enumerate(values) if torch.is_tensor(value)}
        total = torch.tensor([0 if torch.is_tensor(value) else value for value in values], dtype=torch.float64)
        if on_device or self.world_size > 1:
            pinned = total.pin_memory() if self.device.type == "cuda" else total
            total = pinned.to(self.device, non_blocking=True)
        for place, value in on_device.items():
            total[place] = value
        if self.world_size > 1:
            dist.all_reduce(total)
        return total.tolist()

    def any(self, flag: bool) -> bool:
        """True on all ranks if it is true on one. All ranks: contains an all_reduce."""
        return self.sum(float(flag))[0] > 0

    def gather(self, rows: list) -> list:
        """The rows (JSON values) of all ranks, in rank order, on every rank. All ranks: contains all_gathers.

        They travel as JSON, where `all_gather_object` would pickle."""
        if self.world_size == 1:
            return rows
        mine = torch.frombuffer(bytearray(json.dumps(rows).encode()), dtype=torch.uint8).to(self.device)
        sizes = [torch.zeros(1, dtype=torch.int64, device=self.device) for _ in range(self.world_size)]
        dist.all_gather(sizes, torch.tensor([len(mine)], device=self.device))
        longest = max(int(size) for size in sizes)
        padded = torch.nn.functional.pad(mine, (0, longest - len(mine)))
        received = [torch.empty(longest, dtype=torch.uint8, device=self.device) for _ in range(self.world_size)]
        dist.all_gather(received, padded)
        collected = []
        for size, data in zip(sizes, received, strict=True):
            collected += json.loads(bytes(data[: int(size)].cpu().numpy()))
        return collected

    def barrier(self) -> None:
        """All ranks: contains a barrier."""
        if self.world_size > 1:
            dist.barrier()

    def describe(self) -> str:
        kind = "GPU" if self.device.type == "cuda" else "CPU process"
        if self.world_size == 1:
            return f"Running in a single process on {self.device.type.upper()}"
        plural = "es" if kind == "CPU process" else "s"
        return f"Running in distributed mode with {self.world_size} {kind}{plural} ({dist.get_backend()})"


def start_ranks(deterministic: bool = False) -> Ranks:
    """Join the process group that torchrun announces, or run alone without it. NCCL on GPUs, gloo on CPU.
    deterministic: the same operation gives the same bits, each time on the same kind of GPU; where PyTorch knows only
    one that adds up in any order, it raises (Qwen3.5 on GPUs is refused: `recurrent.refuse_deterministic`).

    Raises: `UserError` where there are more local ranks than GPUs, or the rendezvous port is taken."""
    world_size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cpu")
    torch.use_deterministic_algorithms(deterministic)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
        torch.utils.deterministic.fill_uninitialized_memory = False  # a fill of every new tensor, for nothing
    if torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"torchrun started local rank {local_rank} but this node has {torch.cuda.device_count()} visible GPUs; "
                "lower --nproc_per_node or ask Slurm for more GPUs"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32, in training and evaluation alike
    if world_size > 1:
        try:
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=COLLECTIVE_TIMEOUT)
        except (dist.DistNetworkError, RuntimeError) as error:
            address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            reason = str(error).splitlines()[0]
            raise UserError(
                f"the ranks cannot meet at {address} ({reason}); use torchrun --standalone, which picks a free port"
            ) from None
    return Ranks(rank, world_size, device)


def stop_ranks() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def all_or_raise(ranks: Ranks, action):
    """What `action()` returns on this rank. All ranks: contains all_gathers.

    Raises: `UserError` on all ranks where it fails so on one, with that rank's message: nobody waits for a rank that
    has ended."""
    result, failure = None, []
    try:
        result = action()
    except UserError as error:
        failure = [str(error)]
    if failures := ranks.gather(failure):
        raise UserError(failures[0])
    return result


def in_turns(ranks: Ranks, action):
    """What `action()` returns on this rank, where its first call leaves on the disk what later ones find there: the
    first rank calls it, then the first of each other node, then the others. All ranks: contains all_gathers.

    Raises: as `all_or_raise`."""
    turn = 0 if ranks.is_first else 1 if os.environ.get("LOCAL_RANK", "0") == "0" else 2
    return [all_or_raise(ranks, action if turn == now else lambda: None) for now in range(3)][turn]


def check_same_start(trainable: dict[str, torch.nn.Parameter], ranks: Ranks) -> None:
    """Every rank has loaded the same weights by itself. All ranks: contains all_gathers."""
    sums = ranks.gather([sum(float(parameter.detach().double().sum()) for parameter in trainable.values())])
    assert len(set(sums)) == 1, f"the ranks start from different weights: {sums}"


BUCKET_ELEMENTS = 2**26  # 256 MB of float32 gradients travel at a time


def sum_gradients(trainable: dict[str, torch.nn.Parameter], present: Sequence[bool]) -> None:
    """Add up the gradients of all ranks, in place. All ranks: contains all_reduces, the same ones whatever a pass held.

    present: of each parameter, whether any rank has a gradient of it. A rank without one adds zero; where none has one,
    as of a trained vision tower in a step without images, it stays None, as in one process.

    DDP would do it while the backward pass still runs, but needs a gradient of every parameter in every pass of every
    rank, and settles its buckets only in the first step, so that a resumed run would add up in another order. These
    buckets depend on the parameters alone. What DDP's overlap would save is little: an 8B's adapter has 175 MB.
    """
    waiting = [parameter for parameter, has_gradient in zip(trainable.values(), present, strict=True) if has_gradient]
    while waiting:
        bucket, size = [], 0
        while waiting and (not bucket or size + waiting[0].numel() <= BUCKET_ELEMENTS):
            bucket.append(waiting.pop(0))
            size += bucket[-1].numel()
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in bucket]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        for parameter, summed in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
            parameter.grad = summed.view_as(parameter)


class StopSignal:
    """SIGUSR1 (Slurm's warning), SIGTERM, Ctrl-C, a closed terminal and the end of torchrun set a flag; the ranks agree
    on it at the next step boundary.

    The handler does nothing else: saving inside a handler hangs when the signal arrives inside a collective. Only
    SIGUSR1 is handled before `ranks_have_met`: a rank that waits for another in the rendezvous runs no handler, and
    would keep torchrun, which ends it with SIGTERM, waiting for 30 s."""

    def __init__(self):
        self.name: str | None = None
        # A process without torchrun may outlive the shell that started it (nohup).
        self._torchrun = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        signal.signal(signal.SIGUSR1, self._note)

    def ranks_have_met(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup
                signal.signal(number, self._note)

    def _note(self, number, frame) -> None:
        self.name = self.name or signal.Signals(number).name

    @property
    def requested(self) -> bool:
        if self._torchrun not in (None, os.getppid()):  # killed: its workers, in sessions of their own, would train on
            self.name = self.name or "the end of torchrun"
        return self.name is not None


def ignore_stop_signals(worker_id: int = 0) -> None:
    """For data workers: a signal to the whole job must not kill them under a step that still needs them. (They end
    with their parent.)"""
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


def run_command(main: Callable[[], None]) -> NoReturn:
    """Run a command and end the process: with exit code 0, with 2 after one line about a user's mistake, with 1 after
    a traceback, or as Ctrl-C ends one."""
    code = 0
    try:
        with exit_on_user_error():
            try:
                main()
            except RuntimeError as error:  # raised by the DataLoader's SIGCHLD handler, wherever the process just was
                if not str(error).startswith("DataLoader worker"):
                    raise
                raise UserError(
                    f"{str(error).strip().rstrip('.')}. Its memory did not suffice, most likely: set a smaller "
                    "dataloader_num_workers, or give the job more (Slurm: --mem)"
                ) from None
    except SystemExit as end:
        code = end.code or 0
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    except Exception:
        traceback.print_exc()
        code = 1
    end_process(code)


def end_process(code: int = 0) -> NoReturn:
    """The end of a process whose work is done, or has failed. There is no interpreter teardown: during it a thread of
    gloo that drops a finished collective aborts the process (SIGABRT), a late signal makes a finished run fail, and
    Python waits for ever for data workers, which ignore the SIGTERM it sends them."""
    ignore_stop_signals()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # the DataLoader's handler raises when a worker is killed
    for worker in multiprocessing.active_children():
        worker.kill()
    atexit._run_exitfuncs()  # old checkpoints and temporary files are removed there
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
