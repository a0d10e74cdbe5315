"""The schedule: one optimizer step's microbatches through the stages, by torch.distributed.pipelining.

In: a `Zero` around this rank's layers, the microbatches.  Out: the losses on the last stage, gradients reduced or kept everywhere.
Every stage reads its own ids, labels and masks, so one tensor travels between stages: the hidden state. One stage is a pipeline of
one, by the same path.

GPipe: Huang et al. 2018, arXiv:1811.06965. 1F1B and interleaved 1F1B with flushes: Narayanan et al. 2021, arXiv:2104.04473. Looped,
breadth first: Lamy-Poirier 2022, arXiv:2211.05953. Zero bubble: Qi et al. 2023, arXiv:2401.10241, its ZB1P, with one or several chunks.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleLoopedBFS,
    schedules,
)
from torch.distributed.pipelining.schedules import PipelineScheduleMulti, _Action, _ComputationType, _PipelineScheduleRuntime

from megalite.mesh import Mesh
from megalite.parallel.zero import Zero

Batch = dict[str, Tensor]
SCHEDULES: dict[str, Any] = {
    "1f1b": Schedule1F1B,
    "gpipe": ScheduleGPipe,
    "interleaved": ScheduleInterleaved1F1B,
    "looped": ScheduleLoopedBFS,
    "zerobubble": ScheduleInterleavedZeroBubble,
}


class _Stage(PipelineStage):
    """The seam between torch's schedule and DeepSpeed: backward goes through `Zero.backward`.

    And receive buffers only for microbatches in flight: torch 2.13 makes one for every microbatch of a step, both ways, and keeps them for
    the whole run. Here each is made when its transfer begins and dropped when its microbatch is done.
    """

    zero: Zero
    losses: list[Tensor]  # the schedule's, of every microbatch of a step

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> Any:
        self._fill(self.args_recv_info[fwd_chunk_id])
        return super().get_fwd_recv_ops(fwd_chunk_id)

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> Any:
        if self.has_backward and not self.is_last:
            self._fill(self.grad_recv_info[bwd_chunk_id])
        return super().get_bwd_recv_ops(bwd_chunk_id)

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        output = super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)
        if not self.has_backward:
            self.fwd_cache[fwd_chunk_id] = (self.fwd_cache[fwd_chunk_id][0], [])
            self._drop(self.args_recv_info[fwd_chunk_id])
        return output

    def backward_one_chunk(self, bwd_chunk_id: int, *args: Any, **kwargs: Any) -> None:
        super().backward_one_chunk(bwd_chunk_id, *args, **kwargs)
        if self.has_backward:
            if self.is_last:  # torch 2.13 keeps it with its graph, whose leaf is the received hidden state, and that one's gradient
                self.losses[bwd_chunk_id] = self.losses[bwd_chunk_id].detach()
            self._drop(self.args_recv_info[bwd_chunk_id])
            self._drop(self.grad_recv_info[bwd_chunk_id])

    def _setup_forward_recv_info(self, num_microbatches: int, has_backward: bool) -> None:
        super()._setup_forward_recv_info(1, has_backward)
        self._drop(self.args_recv_info[0])
        for number in range(1, num_microbatches):
            self.args_recv_info[number] = tuple(copy.copy(info) for info in self.args_recv_info[0])

    def _create_grad_recv_info(self, act_send_info: Any) -> Any:
        found = super()._create_grad_recv_info(act_send_info)
        self._drop(found)
        return found

    def _fill(self, received: Any) -> None:
        for info in received:
            if not info.is_root_arg and info.buffer is None:
                meta = info.tensor_meta
                info.buffer = torch.empty_strided(meta.shape, meta.stride, dtype=meta.dtype, device=self.device)

    def _drop(self, received: Any) -> None:
        for info in received:
            info.buffer = None

    def backward_maybe_with_nosync(self, backward_type: Any, bwd_kwargs: dict[str, Any], last_backward: bool = False) -> Any:
        output = bwd_kwargs["stage_output"]
        if self.is_last:
            self.zero.backward(output.sum() if self.zero.scale is None else output.sum() * self.zero.scale.value)
        else:
            (hidden,) = output if isinstance(output, (tuple, list)) else (output,)
            (received,) = bwd_kwargs["output_grads"]
            self.zero.backward(hidden, received)
        return tuple(getattr(value, "grad", None) for value in bwd_kwargs["input_values"]), None


class _Transfers:
    """What was asked for together; when it is over, its tensors belong to who sent or received them again."""

    def __init__(self, works: list[Any], ops: list[Any]) -> None:
        self.works, self.ops = works, ops

    def is_over(self) -> bool:
        if all(work.is_completed() for work in self.works):
            self._let_go()
        return not self.ops

    def wait(self) -> None:
        for work in self.works:
            work.wait()
        self._let_go()

    def _let_go(self) -> None:
        for op in self.ops:
            op.tensor = None
        self.works, self.ops = [], []


@contextmanager
def _letting_go_of_what_travelled() -> Iterator[None]:
    """torch 2.13's schedules keep every transfer in some variable until the next one of its kind or the end of the step, and with it the
    tensor: 1F1B the last gradient that was sent, the last that was received and one of the first outputs; GPipe all gradients; those of
    several chunks two hidden states for every microbatch and chunk. Here those that are over are dropped when they have been waited for,
    or whenever another transfer begins. (gloo knows that one is over only when it has been waited for.)
    """
    plain, under_way = schedules._batch_p2p, []

    def batch(ops: list[Any], desc: str | None = None) -> list[Any]:
        under_way[:] = [transfers for transfers in under_way if not transfers.is_over()]
        transfers = _Transfers(plain(ops, desc), ops)
        under_way.append(transfers)
        return [transfers]

    schedules._batch_p2p = batch
    try:
        yield
    finally:
        schedules._batch_p2p = plain


def exchanged(order: dict[int, list[_Action | None]], num_stages: int) -> dict[int, list[_Action]]:
    """What each rank does, in order, transfers included: of each rank's computations, one a time step, nothing where it waits.

    What a step has computed is sent and received when the step ends, so what a rank holds of others' is known (tune/splits.py). A rank
    whose input has not come waits. Transfers are in one order for all ranks, so none waits for another in a circle. torch 2.13's own
    `_add_send_recv` lets a rank use what came in the same step, in order of ranks, and gives FSDP's UNSHARD and RESHARD steps of their own,
    which are nothing here: the last rank had up to three hidden states more.
    """
    kind = _ComputationType
    found: dict[int, list[_Action]] = {rank: [] for rank in order}
    left = {rank: list(reversed(actions)) for rank, actions in order.items()}
    came: set[_Action] = set()

    def neighbour(action: _Action, forward: int) -> int | None:
        """Of its stage, the one so many stages further in the direction of the action; none, where it is of weights."""
        if action.computation_type == kind.BACKWARD_WEIGHT:
            return None
        stage = action.stage_index + (forward if action.computation_type == kind.FORWARD else -forward)
        return stage if 0 <= stage < num_stages else None

    while any(left.values()):
        computed = []
        for rank, actions in left.items():
            action = actions[-1] if actions else None
            if action is None or neighbour(action, -1) is None or _received(action, action.stage_index) in came:
                del actions[-1:]
                if action is not None:
                    computed.append((rank, action))
        for rank, action in computed:
            found[rank].append(action)
        for rank, action in computed:
            target = neighbour(action, 1)
            if target is not None:
                forward = action.computation_type == kind.FORWARD
                found[rank].append(_Action(action.stage_index, kind.SEND_F if forward else kind.SEND_B, action.microbatch_index))
                found[target % len(order)].append(_received(action, target))
                came.add(_received(action, target))
    return found


def _received(action: _Action, stage: int) -> _Action:
    """The transfer that brings a stage what such a computation computes, or needs."""
    forward = action.computation_type == _ComputationType.FORWARD
    return _Action(stage, _ComputationType.RECV_F if forward else _ComputationType.RECV_B, action.microbatch_index)


class _Chunk(nn.Module):
    """One chunk of the rank's layers, as the schedule calls it; the layers themselves belong to DeepSpeed's engine."""

    def __init__(self, zero: Zero, number: int) -> None:
        super().__init__()
        self.call = functools.partial(zero.forward, chunk=number)

    def forward(self, x: Tensor, batch: Batch) -> Tensor:
        return self.call(x, batch)


class Pipeline:
    """Runs training and validation steps of `num_microbatches` microbatches over pp x `num_chunks` stages.

    `ids` (b, s), `hidden` (b, s, d) and `loss` (parts,) are meta tensors: what goes in, what travels between stages, what comes out.
    """

    def __init__(
        self, zero: Zero, *, mesh: Mesh, schedule: str, num_chunks: int, num_microbatches: int, ids: Tensor, hidden: Tensor, loss: Tensor
    ) -> None:
        self.zero = zero
        hidden, loss = hidden.requires_grad_(), loss.requires_grad_()  # decides whether a gradient is sent back
        last = mesh.pp * num_chunks - 1
        self.stages = []
        for number in range(num_chunks):
            index = mesh.pp_rank + number * mesh.pp
            stage = _Stage(
                _Chunk(zero, number),
                index,
                last + 1,
                mesh.device,
                input_args=(ids if index == 0 else hidden,),
                output_args=(loss if index == last else hidden,),
                group=mesh.group("pp"),
                dw_builder=zero.later.held if zero.later else None,
            )
            stage.zero = zero
            self.stages.append(stage)
        kind = SCHEDULES[schedule]
        mine = self.stages if issubclass(kind, PipelineScheduleMulti) else self.stages[0]
        self.schedule = kind(mine, num_microbatches, loss_fn=lambda output, _: output, scale_grads=False)
        if isinstance(self.schedule, _PipelineScheduleRuntime):
            self.schedule.pipeline_order_with_comms = exchanged(self.schedule.pipeline_order, last + 1)
        for stage in self.stages:
            stage.losses = self.schedule._internal_losses

    def train(self, microbatches: list[Batch]) -> list[Tensor]:
        """Forward and backward of every microbatch; their losses (parts,) on the last stage, nothing elsewhere."""
        with self.zero.step(len(microbatches)):
            return self._run(microbatches)

    def validate(self, microbatches: list[Batch]) -> list[Tensor]:
        """Forward alone."""
        with torch.no_grad(), self.zero.aside():
            return self._run(microbatches, train=False)

    def _run(self, microbatches: list[Batch], *, train: bool = True) -> list[Tensor]:
        """torch's `step`, but for microbatches that are cut already: it would cut tensors, and put outputs together again."""
        losses: list[Tensor] = []
        targets: list[None] = [None] * len(microbatches)
        args = [(batch["ids"],) if self.stages[0].is_first else () for batch in microbatches]
        kwargs = [{"batch": batch} for batch in microbatches]
        self.schedule._has_backward = train
        for stage in self.stages:
            stage.has_backward = train
            stage.clear_runtime_states()
        with _letting_go_of_what_travelled():
            self.schedule._step_microbatches(args, kwargs, targets, losses, return_outputs=False)
        return [loss.detach() for loss in losses]
