"""What a rank holds: its shard, and while building one layer beside it."""

from __future__ import annotations

import functools
import gc
import json
import re
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from megalite import launch, models
from megalite.config import Config
from megalite.models import counts

MIB = 2**20


def _resident() -> int:
    """Bytes of this process's own memory; pages of libraries, which come in when first used, are left out."""
    return int(re.findall(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())[0]) * 1024


class _Peak(threading.Thread):
    """The highest `_resident` since the start, looked at every millisecond."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.before = self.highest = _resident()
        self.done = threading.Event()

    def run(self) -> None:
        while not self.done.wait(0.001):
            self.highest = max(self.highest, _resident())


def _config(**mesh: int) -> Config:
    """Twelve blocks of 3.1 M parameters, 38 M in all: 151 MB in fp32."""
    return Config.model_validate(
        {
            "model": {"layers": 12, "width": 512, "heads": 8, "vocab": 1000, "sequence": 16},
            "mesh": mesh,
            "train": {"global_batch": 8, "micro_batch": 1, "precision": "fp32"},
        }
    )


def _build(rank: int, *, config: Config, stage: int) -> int:
    """Bytes that building the stage took at its peak, above what the rank held before."""
    from megalite.engine import Engine
    from megalite.mesh import Mesh
    from megalite.parallel import mends
    from megalite.parallel.settings import choose

    mesh = Mesh.start(**config.mesh.degrees, device=torch.device("cpu"))
    mends.start()
    engine = Engine.__new__(Engine)
    engine.config, engine.mesh, engine.dtype = config, mesh, torch.float32
    document = {"zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0}}
    settings = choose(document, precision="fp32", micro_batch=1, reduce="microbatch")
    peak = _Peak()
    peak.start()
    kept = engine._build(settings)
    peak.done.set()
    peak.join()
    assert kept.orders
    return peak.highest - peak.before


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc to see a process's peak memory")
@pytest.mark.parametrize(
    ("mesh", "stage"),
    [({"dp": 2, "pp": 2}, 3), *(pytest.param(*case, marks=pytest.mark.slow) for case in (({"tp": 4}, 1), ({"dp": 4}, 3), ({"pp": 4}, 1)))],
)
def test_building_holds_one_layer_beside_the_shard(mesh: dict[str, int], stage: int) -> None:
    config = _config(**mesh)
    parameters = counts.num_parameters(config.model)
    layer = max(sum(p.numel() for p in make().parameters()) for _, make in models.layers(config.model))
    share = 4 * parameters / 4  # bytes of a quarter of the model, as every one of these meshes gives a rank; stages are not quite even
    # in a fresh process: ranks forked from a long-lived one would build in pages that it had used and freed
    command = [sys.executable, __file__, json.dumps({"mesh": mesh, "stage": stage})]
    peaks = json.loads(subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout.splitlines()[-1])
    assert max(peaks) < 1.35 * share + 2 * 4 * layer + 16 * MIB, [f"{peak / MIB:.0f} MiB" for peak in peaks]
    assert max(peaks) < 4 * parameters, "a rank held the whole model"
    assert min(peaks) > 0.5 * share, "the measure does not see the weights at all"


def _most_buffers(rank: int, *, schedule: str) -> int:
    """The largest number of receive buffers at any forward or backward of a step of 8 microbatches on 2 stages, and while it is set up."""
    import torch.distributed.pipelining.stage as torch_stage

    from megalite.parallel.pipeline import _Stage
    from megalite.tune.parity import batch_of, microbatches, start_engine

    config = Config.model_validate(
        {
            "model": {"layers": 2, "width": 32, "heads": 2, "vocab": 50, "sequence": 16},
            "mesh": {"dp": 1, "pp": 2},
            "train": {"global_batch": 8, "micro_batch": 1, "precision": "fp32", "schedule": schedule},
        }
    )
    engine, most, made, make = start_engine(config, {}), 0, [], torch_stage._make_tensor_from_meta

    def watch(*args: Any) -> torch.Tensor:
        nonlocal most
        tensor = make(*args)
        made.append(weakref.ref(tensor))
        most = max(most, sum(ref() is not None for ref in made))
        return tensor

    torch_stage._make_tensor_from_meta = watch
    backward = _Stage.backward_maybe_with_nosync

    def count(stage: _Stage, *args: object, **kwargs: object) -> object:
        nonlocal most
        received = [*stage.args_recv_info.values(), *stage.grad_recv_info.values()]
        most = max(most, sum(info.buffer is not None for infos in received for info in infos))
        return backward(stage, *args, **kwargs)

    _Stage.backward_maybe_with_nosync = count  # type: ignore[method-assign]
    engine.step(0, microbatches(batch_of(config, 0), config, dp=1, dp_rank=0))
    (pipeline,) = engine.pipelines.values()
    left = [info.buffer for stage in pipeline.stages for infos in stage.args_recv_info.values() for info in infos]
    assert all(buffer is None for buffer in left)
    return most


def test_only_microbatches_in_flight_have_receive_buffers() -> None:
    """1F1B keeps at most as many activations as there are stages left, and one gradient; GPipe keeps all 8."""
    first, last = launch.run_ranks(2, functools.partial(_most_buffers, schedule="1f1b"), warm=("megalite.engine",))
    assert (first, last) == (1, 1)
    first, last = launch.run_ranks(2, functools.partial(_most_buffers, schedule="gpipe"), warm=("megalite.engine",))
    assert (first, last) == (1, 8)


def test_chunks_receive_when_the_step_ends_that_sends() -> None:
    """By torch's own order the last rank has a sixth."""
    first, last = launch.run_ranks(2, functools.partial(_most_buffers, schedule="interleaved"), warm=("megalite.engine",))
    assert (first, last) == (3, 5)


def _uncollected(rank: int, *, config: Config, stage: int) -> list[tuple[int, ...]]:
    """Shapes of the tensors that only the garbage collector can free after the third step."""
    from megalite.tune.parity import batch_of, microbatches, start_engine

    limits = {"stage3_max_live_parameters": 5000, "stage3_prefetch_bucket_size": 2000, "stage3_param_persistence_threshold": 0}
    engine = start_engine(config, {"zero_optimization": {"stage": stage, **limits}})
    for step in range(3):
        mine = microbatches(batch_of(config, step), config, dp=engine.mesh.dp, dp_rank=engine.mesh.dp_rank)
        gc.collect()
        gc.disable()
        engine.step(step, mine)
    gc.set_debug(gc.DEBUG_SAVEALL)
    gc.collect()
    return [tuple(found.shape) for found in gc.garbage if isinstance(found, torch.Tensor)]


@pytest.mark.parametrize(
    ("mesh", "stage", "train"),
    [({"dp": 2, "pp": 2}, 3, {"schedule": "interleaved", "recompute": "full"}), ({"dp": 2, "tp": 2}, 1, {"recompute": "selective"})],
)
def test_a_step_leaves_no_tensor_to_the_garbage_collector(mesh: dict[str, int], stage: int, train: dict[str, Any]) -> None:
    """Which looks for garbage seldom (cli.py): a tensor in a cycle would stay for many steps."""
    config = Config.model_validate(
        {
            "model": {"layers": 4, "width": 32, "heads": 2, "vocab": 50, "sequence": 16},
            "mesh": mesh,
            "train": {"global_batch": 8, "micro_batch": 1, "precision": "bf16", **train},
        }
    )
    left = launch.run_ranks(4, functools.partial(_uncollected, config=config, stage=stage), warm=("megalite.engine",))
    assert left == [[]] * 4


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    build = functools.partial(_build, config=_config(**asked["mesh"]), stage=asked["stage"])
    print(json.dumps(launch.run_ranks(4, build, warm=("megalite.engine",))))
