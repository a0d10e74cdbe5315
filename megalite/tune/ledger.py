"""Keeps the books of a run: every storage while it lives, every FLOP of a product, every collective with its bytes.

In: whatever runs inside `with Ledger()`, on real tensors or on fake ones: both pass through torch's dispatcher.  Out: bytes alive and their
peak by kind of device, who owned the peak, FLOPs, collectives. Storages are counted in blocks of `BLOCK` bytes, as CUDA's caching allocator
hands them out. What an operator allocates inside itself is not seen, in neither kind of run.
"""

from __future__ import annotations

import sys
import weakref
from collections import Counter, defaultdict
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

from megalite.parallel.collectives import named

BLOCK = 512
PLACES = ("megalite", "deepspeed")  # packages whose lines own what is allocated below them


class Sent(NamedTuple):
    """A collective as this rank calls it."""

    kind: str
    ranks: int
    size: int  # bytes of the tensors it is given


class Ledger(TorchDispatchMode):
    """Books of one rank. With `owners`, the line of code that allocated each storage is kept too, which takes time."""

    def __init__(self, *, owners: bool = False) -> None:
        super().__init__()
        self.owners = owners
        self.sizes: dict[int, tuple[str, int, str]] = {}  # storage -> device, bytes, owner
        self.alive: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self.owned_at_peak: dict[str, Counter[str]] = {}
        self.flops = 0
        self.sent: list[Sent] = []

    def restart(self) -> None:
        """From here on: a new peak, new FLOPs, new collectives. What lives goes on living."""
        self.peak = Counter(self.alive)
        self.flops, self.sent = 0, []
        if self.owners:
            self.owned_at_peak = {device: self.owned(device) for device in self.alive}

    def owned(self, device: str) -> Counter[str]:
        """Bytes alive by the line that allocated them."""
        found: Counter[str] = Counter()
        for where, size, owner in self.sizes.values():
            if where == device:
                found[owner] += size
        return found

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace in ("c10d", "_c10d_functional") and func.__name__.split(".")[0] != "wait_tensor":
            self._book_collective(func, args)
        found = func(*args, **kwargs)
        self._book_flops(func, args, kwargs, found)
        grown = [self._book(tensor) for tensor in tree_iter(found) if isinstance(tensor, Tensor)]
        for device in {device for device in grown if device}:
            if self.alive[device] > self.peak[device]:
                self.peak[device] = self.alive[device]
                if self.owners:
                    self.owned_at_peak[device] = self.owned(device)
        return found

    def _book(self, tensor: Tensor) -> str:
        """Enter a tensor's storage, or its new size; returns the device if it grew."""
        if tensor.device.type == "meta":
            return ""
        storage = tensor.untyped_storage()
        key, device = storage._cdata, tensor.device.type
        size = -(-storage.nbytes() // BLOCK) * BLOCK
        known = self.sizes.get(key)
        if known is None:
            weakref.finalize(storage, self._strike, key)
        elif known[1] == size:
            return ""
        self.alive[device] += size - (known[1] if known else 0)
        self.sizes[key] = (device, size, known[2] if known else self._owner())
        return device

    def _strike(self, key: int) -> None:
        device, size, _ = self.sizes.pop(key)
        self.alive[device] -= size

    def _owner(self) -> str:
        """The innermost line of ours or DeepSpeed's that is at work."""
        if not self.owners:
            return ""
        frame = sys._getframe(2)
        while frame is not None:
            name = frame.f_globals.get("__name__", "")
            if name.split(".")[0] in PLACES and not name.startswith("megalite.tune"):
                return f"{name.removeprefix('megalite.')}:{frame.f_lineno} {frame.f_code.co_name}"
            frame = frame.f_back  # type: ignore[assignment]
        return "autograd"

    def _book_flops(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], found: Any) -> None:
        name, back = func.__name__, "backward" in func.__name__
        formula = flop_registry.get(func._overloadpacket)
        if func.namespace == "megalite" and name.startswith("attention"):  # all s x s scores, as models/counts.py counts them
            q, k = args[2:4] if back else args[:2]  # (b, s, h, k)
            self.flops += (10 if back else 4) * q.numel() * k.shape[1]
        elif formula is not None:
            self.flops += formula(*args, **kwargs, out_val=found)
        elif name.startswith("_scaled_dot_product_flash_attention_for_cpu"):
            q, k = args[1:3] if back else args[:2]  # (b, h, s, k)
            self.flops += (10 if back else 4) * q.numel() * k.shape[2]
        elif func.namespace == "megalite" and name.startswith("gathered_linear"):
            self.flops += 2 * found.numel() * args[1].shape[1]

    def _book_collective(self, func: Any, args: tuple[Any, ...]) -> None:
        if func.namespace == "c10d":
            groups = [value for value in args if type(value).__name__ == "ScriptObject"]
            ranks = next((size for group in groups if (size := _size(group))), 1)
        else:
            ranks = named(args[-1]).size()
        size = sum(tensor.numel() * tensor.element_size() for tensor in tree_iter(args) if isinstance(tensor, Tensor))
        self.sent.append(Sent(func.__name__.split(".")[0], ranks, size))

    def summary(self) -> dict[str, tuple[int, int]]:
        """Calls and bytes of each kind of collective and size of group."""
        found: dict[str, tuple[int, int]] = defaultdict(lambda: (0, 0))
        for kind, ranks, size in self.sent:
            calls, total = found[f"{kind} x{ranks}"]
            found[f"{kind} x{ranks}"] = calls + 1, total + size
        return dict(found)


def _size(value: Any) -> int:
    try:
        return dist.ProcessGroup.unbox(value).size()
    except (RuntimeError, ValueError):
        return 0
