"""One rank of any world without the others and without memory: DeepSpeed and torch on fake tensors, in a world of one process.

In: the rank and the size of the world to pretend, and whether there is a GPU in it.  Out: torch.distributed with a process group whose
collectives do nothing, and a device. Inside `pretending()` tensors have shapes and no data. What asks for data is answered so that a run
goes on: numbers are 1, nothing overflows, everything is equal. The process is of no use for anything else afterwards: run it in one of its
own.

What DeepSpeed 0.19.8 and torch 2.13 need for that is here, each with its reason.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch._C._distributed_c10d import Work
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore, _create_fake_pg
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from megalite.parallel import collectives

GPU = "fakegpu"
BACKEND = "fakeranks"


def join(rank: int, world: int, *, gpu: bool) -> torch.device:
    """Be that rank of that world; returns its device. Call before DeepSpeed is imported.

    With `gpu`, neither this process nor the one it was forked from may have run a backward pass: torch's autograd engine counts the devices
    at its first one, and fails with an INTERNAL ASSERT about device_ready_queues_ on a device that came later.
    """
    if dist.is_initialized():
        dist.destroy_process_group()
    if not gpu:
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
        return torch.device("cpu")
    _make_gpu()
    dist.Backend.register_backend(BACKEND, _create_fake_pg, extended_api=True, devices=[GPU, "cpu"])
    dist.init_process_group(BACKEND, store=FakeStore(), rank=rank, world_size=world)
    return torch.device(GPU, 0)


def _make_gpu() -> None:
    """A device of its own for fake tensors, through torch's PrivateUse1: fake CUDA tensors end the process where torch has no CUDA."""
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    _setup_privateuseone_for_python_backend(GPU)
    there = getattr(torch, GPU)
    there.get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16]
    there.get_rng_state = lambda *_: torch.get_rng_state()
    there.set_rng_state = lambda *_: None
    import deepspeed.accelerator.real_accelerator as real_accelerator
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

    class Pretended(CPU_Accelerator):
        """What DeepSpeed asks of a GPU, without one."""

        def __init__(self) -> None:
            super().__init__()
            self._name, self._communication_backend_name = GPU, BACKEND

        def device_name(self, device_index: int | None = None) -> str:  # type: ignore[override]
            return GPU if device_index is None else f"{GPU}:{device_index}"

        def current_device_name(self) -> str:  # type: ignore[override]
            return f"{GPU}:0"

        def current_device(self) -> int:
            return 0

        def device(self, device_index: int | None = None) -> Any:
            return contextlib.nullcontext()

        def pin_memory(self, tensor: Any, align_bytes: int = 1) -> Any:  # type: ignore[override]
            return tensor

        def is_pinned(self, tensor: Any) -> bool:
            return True

        def on_accelerator(self, tensor: Any) -> bool:
            return tensor.device.type == GPU

        def total_memory(self, device_index: int | None = None) -> int:
            return 1 << 40

        def available_memory(self, device_index: int | None = None) -> int:
            return 1 << 40

    real_accelerator.set_accelerator(Pretended())


class _Answers(TorchDispatchMode):
    """Where Python asks a tensor for its value."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if args and isinstance(args[0], FakeTensor):
            if name == "aten::_local_scalar_dense":
                dtype = args[0].dtype
                return 1.0 if dtype.is_floating_point else False if dtype == torch.bool else 1
            if name == "aten::is_nonzero":
                return False
            if name == "aten::equal":
                return True
            if name == "_c10d_functional::wait_tensor":  # puts out what it is given; torch's stand-in (2.13) a new tensor
                return args[0]
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def pretending() -> Iterator[None]:
    """New tensors are fake in here."""
    mend()
    with FakeTensorMode(allow_non_fake_inputs=True), _Answers():
        yield


def mend() -> None:
    """What else must not look at data, or at other ranks."""
    import deepspeed.runtime.zero.partition_parameters as zero_partition

    keep_what_is_sent()
    for move in ("to", "bfloat16", "half", "float"):  # modules are where and what they shall be; swapping fake parameters fails
        setattr(nn.Module, move, lambda self, *_, **__: self)
    made = torch.tensor

    def tensor(data: Any, *args: Any, device: Any = None, **kwargs: Any) -> Any:
        """The PrivateUse1 device has no copy from Python's numbers."""
        if device is not None and GPU in str(device):
            there = made(data, *args, **kwargs)
            return torch.empty(there.shape, dtype=there.dtype, device=device)
        return made(data, *args, device=device, **kwargs)

    torch.tensor = tensor  # type: ignore[assignment]
    zero_partition._orig_torch_tensor = tensor  # type: ignore[attr-defined]
    FakeTensor.pin_memory = lambda self, *_, **__: self  # type: ignore[method-assign]
    torch.Tensor.is_pinned = lambda self, *_, **__: False  # type: ignore[method-assign]


def let_go_when_waited_for() -> None:
    """Real transfers: gloo's thread wakes who waits and drops the tensors only then (torch 2.13): peaks of two runs were a weight apart.

    A moment after each wait it has dropped them. And when a reduce-scatter is waited for, gloo makes tensors of its own, as large as what
    was sent, which are not booked, as what an operator makes inside itself is not. For comparisons; a run that trains needs no such thing.
    """
    wait = Work.wait

    def and_a_moment(self: Any, *args: Any) -> bool:
        with _disable_current_modes():
            done = wait(self, *args)
        time.sleep(0.01)
        return done

    Work.wait = and_a_moment  # type: ignore[method-assign]

    class Patient:
        """torch's functional collectives, which are waited for by an operator."""

        def __getattr__(self, name: str) -> Any:
            return getattr(torch.ops._c10d_functional, name)

        def wait_tensor(self, tensor: Any) -> Any:
            done = torch.ops._c10d_functional.wait_tensor(tensor)
            time.sleep(0.01)
            return done

    collectives.ops = Patient()  # type: ignore[assignment]


class _Kept:
    """A transfer in flight, which keeps its tensor alive as those of gloo and NCCL do."""

    def __init__(self, work: Any, tensor: Any) -> None:
        self.work, self.tensor = work, tensor

    def wait(self, *args: Any) -> bool:
        return True if self.work is None else self.work.wait(*args)

    def is_completed(self) -> bool:
        return True


def keep_what_is_sent() -> None:
    """A fake send is over at once and lets go of its tensor, which a real one holds until somebody has waited for it."""
    send = dist.isend

    def isend(tensor: Any, *args: Any, **kwargs: Any) -> Any:
        return _Kept(send(tensor, *args, **kwargs), tensor)

    dist.isend = dist.distributed_c10d.isend = isend  # type: ignore[assignment, attr-defined]
