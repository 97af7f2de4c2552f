"""Counts, on a CPU, where the host would wait for a GPU."""

import contextlib
import traceback
import weakref
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import model as modeling

aten = torch.ops.aten
# Operations whose result has a shape, or is a number, that the host learns from the device.
READS = {
    aten._local_scalar_dense.default,  # item(), float(), int(), bool()
    aten.nonzero.default,
    aten.masked_select.default,
    aten.repeat_interleave.Tensor,
    aten._unique2.default,
    aten.unique_consecutive.default,
    aten.equal.default,
}
TO_HOST = {torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.cpu}


class Waits(TorchDispatchMode):
    """`found`: one line for each wait, while it lasts. On the "device" are the parameters, what `to_device` moves, and
    what is computed from either; the host may read all others."""

    def __init__(self, module: torch.nn.Module):
        super().__init__()
        self.found: list[str] = []
        self.moving = 0  # calls of `to_device`, one inside the other
        self._storages: dict[int, weakref.finalize] = {}
        for tensor in [*module.parameters(), *module.buffers()]:
            self.mark(tensor)

    def mark(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._storages:
            self._storages[storage._cdata] = weakref.finalize(storage, self._storages.pop, storage._cdata, None)

    def is_on_device(self, value) -> bool:
        return torch.is_tensor(value) and value.untyped_storage()._cdata in self._storages

    def note(self, what: str) -> None:
        frames = [f for f in traceback.extract_stack() if "/torch/" not in f.filename and "waits.py" not in f.filename]
        self.found.append(f"{what} at {frames[-1].filename.rsplit('/', 1)[-1]}:{frames[-1].lineno}")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if any(map(self.is_on_device, tree_leaves((args, kwargs)))):
            by_mask = function in (aten.index.Tensor, aten.index_put.default, aten.index_put_.default) and any(
                torch.is_tensor(index) and index.dtype in (torch.bool, torch.uint8) for index in args[1]
            )
            if function in READS or by_mask:
                self.note(str(function))
            for tensor in filter(torch.is_tensor, tree_leaves(result)):
                self.mark(tensor)
        return result


class _PythonReads(TorchFunctionMode):
    """What never reaches the dispatcher on a CPU."""

    def __init__(self, waits: Waits):
        super().__init__()
        self.waits = waits

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in TO_HOST and self.waits.is_on_device(args[0]):
            self.waits.note(function.__name__)
        # Copies from memory that is not pinned; what `to_device` moves is. (AdamW names the CPU for its step counts.)
        devices = [value for value in (*args[1:], kwargs.get("device")) if isinstance(value, torch.device)]
        if function is torch.tensor and devices:
            self.waits.note("torch.tensor(device=)")
        if function is torch.Tensor.to and devices and not self.waits.moving and not self.waits.is_on_device(args[0]):
            self.waits.note("to(device)")
        return function(*args, **kwargs)


@contextlib.contextmanager
def waits(module: torch.nn.Module):
    """Counts while the block runs. module: its parameters and buffers are on the device."""
    counted = Waits(module)
    to_device = modeling.to_device

    def moved(batch: dict, device: torch.device) -> dict:
        counted.moving += 1
        copied = to_device(batch, device)
        counted.moving -= 1
        for name, value in copied.items():
            if torch.is_tensor(value) and name not in modeling.ON_HOST:
                copied[name] = value.clone()  # the host keeps its own
                counted.mark(copied[name])
        return copied

    with mock.patch.object(modeling, "to_device", moved), counted, _PythonReads(counted):
        yield counted
