"""Each mend of DeepSpeed in parallel/mends.py and zero.py is still needed: taken out, something breaks.

When one of these fails, DeepSpeed has changed: see whether the mend can go, and docs/design/zero.md with it.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import os
import sys
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from torch import Tensor, nn

from megalite import launch
from megalite.config import Config
from megalite.crew import RankError
from megalite.mesh import Mesh
from megalite.parallel import mends, zero
from megalite.parallel.gather import Gathering, Limits
from megalite.tune import parity

sys.path.insert(0, str(Path(__file__).parent.parent / "parity"))
from compare import config_of, on_mesh


def _plain_deepspeed(rank: int, *, stage: int, precision: str) -> tuple[str, float]:
    import deepspeed

    mends.start()
    mesh = Mesh.start(dp=1, pp=1, tp=1, device=torch.device("cpu"))
    layer = nn.Linear(8, 8).to(torch.bfloat16 if precision == "bf16" else torch.float32)
    configuration = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": precision == "bf16"},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": {"stage": stage},
    }
    engine, *_ = deepspeed.initialize(
        model=layer, optimizer=torch.optim.AdamW(layer.parameters()), config=configuration, mpu=zero._Axes(mesh, mesh.group("dp"))
    )
    engine.backward(engine(torch.ones(1, 8, dtype=layer.weight.dtype)).float().sum())
    engine.step()
    return type(engine.optimizer).__name__, float(engine.get_global_grad_norm() or 0)


def test_deepspeeds_stage_0_knows_no_gradient_norm() -> None:
    ((_, norm),) = launch.run_ranks(1, lambda rank: _plain_deepspeed(rank, stage=0, precision="fp32"))
    assert norm == 0


def test_deepspeeds_stage_1_is_another_optimizer_in_bf16() -> None:
    ((bf16, _),) = launch.run_ranks(1, lambda rank: _plain_deepspeed(rank, stage=1, precision="bf16"))
    ((fp32, _),) = launch.run_ranks(1, lambda rank: _plain_deepspeed(rank, stage=1, precision="fp32"))
    assert bf16 != fp32


def test_deepspeed_would_compile_an_operation_at_the_start() -> None:
    import deepspeed.comm.torch  # noqa: F401

    backend = sys.modules["deepspeed.comm.torch"]
    assert "build_shm_op()" in inspect.getsource(backend.TorchBackend.__init__)


def test_deepspeed_would_import_torchs_compiler_for_an_optimizer_that_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    name, compiled = "deepspeed.runtime.zero.muon.original_muon", []
    assert inspect.isfunction(sys.modules[name].muon_update) and not hasattr(sys.modules[name].muon_update, "_torchdynamo_orig_callable")
    monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(torch, "compile", compiled.append)
    importlib.import_module(name)
    assert compiled


def test_deepspeed_records_a_trace_per_root_forward() -> None:
    from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload

    assert "fwd_pre_hook" in inspect.getsource(DeepSpeedZeRoOffload.setup_zero_stage3_hooks)


def test_deepspeeds_linear_adds_its_bias_to_what_selective_recomputation_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would be in there twice from the second step on, biases being 0 in the first; what stands in for a result cannot be added to."""
    monkeypatch.setattr(mends, "add_biases_out_of_place", lambda: None)
    with pytest.raises(RankError, match="the written-to tensor"):
        on_mesh(config_of(dp=2, recompute="selective"), zero=3)


def test_deepspeed_cannot_read_an_architecture_with_a_letter() -> None:
    from deepspeed.ops.op_builder.quantizer import QuantizerBuilder

    builder = QuantizerBuilder()
    builder.jit_mode, builder._jit_arch_list = True, "8.0;9.0a+PTX"
    with pytest.raises(ValueError, match="0a"):
        builder.compute_capability_args()

    def read(rank: int) -> str:
        mends.start()
        builder.compute_capability_args()
        return os.environ["TORCH_CUDA_ARCH_LIST"]  # what torch compiles for

    assert launch.run_ranks(1, read, warm=("megalite.engine",)) == ["8.0;9.0+PTX"]


def _waits(rank: int, *, config: Config, stage: int) -> int:
    """How often the host waits for the device in the fourth step; DeepSpeed measures from the third one on."""
    from deepspeed.accelerator import get_accelerator

    engine, calls = parity.start_engine(config, {"zero_optimization": {"stage": stage}}), []
    get_accelerator().synchronize = lambda *_: calls.append(1)  # type: ignore[union-attr, method-assign]
    for step in range(4):
        calls.clear()
        engine.step(step, parity.microbatches(parity.batch_of(config, step), config, dp=1, dp_rank=0))
    return len(calls)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_deepspeed_waits_for_the_gpu_around_every_forward_pass(stage: int, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(dp=1)
    work = functools.partial(_waits, config=config, stage=stage)
    assert launch.run_ranks(1, work, warm=("megalite.engine",)) == [0]
    monkeypatch.setattr(mends, "leave_forwards_alone", lambda engine: None)
    microbatches = config.train.global_batch // config.train.micro_batch
    assert launch.run_ranks(1, work, warm=("megalite.engine",)) == [microbatches + 1]  # and once after the update


class _Pair(nn.Linear):
    def forward(self, x: Tensor) -> Any:
        return x, super().forward(x)


def test_a_module_with_weights_that_puts_out_no_single_tensor_is_refused() -> None:
    pair = _Pair(2, 2)
    for weight in pair.parameters():
        weight.ds_numel, weight.ds_persist, weight.ds_status = 1, False, ZeroParamStatus.AVAILABLE  # type: ignore[attr-defined]
    Gathering([pair], MagicMock(forward_hooks=[], backward_hooks=[]), Limits(live=0, ahead=0), device=torch.device("cpu"))
    with pytest.raises(TypeError, match="_Pair has weights and puts out tuple; under ZeRO-3 it must be one tensor"):
        pair(torch.ones(1, 2))


def test_deepspeed_takes_slow_fp16_for_none() -> None:
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

    if torch.ops.mkldnn._is_mkldnn_fp16_supported():
        pytest.skip("this CPU has fast fp16, which DeepSpeed sees")
    assert torch.ones(2, 2, dtype=torch.float16).mm(torch.ones(2, 2, dtype=torch.float16)).sum() == 8
    assert not CPU_Accelerator().is_fp16_supported()
