"""What a cluster can do: GPUs, links and hosts, from data sheets and published measurements, and by the user's own YAML.

In: `8x8xH100` (nodes x GPUs a node x kind), or a YAML file.  Out: a `Cluster`. The table is clusters.yaml, every number with its source.
Bandwidths are bytes a second. `inside` is the bus bandwidth that a ring of all GPUs of one node reaches, `node_link` what leaves a node,
all its links together, `scale` the bus bandwidth measured over 1, 2, 4, ... nodes where somebody measured it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from megalite.config import suggest
from megalite.errors import UserError
from megalite.hardware import GIB, GPUS, Gpu

HERE = re.compile(r"(?:(\d+)x)?here", re.ASCII)
PATTERN = re.compile(r"(?:(\d+)x)?(\d+)x(?!\d+$)([\w.-]+)", re.ASCII)


@dataclass(frozen=True)
class Cluster:
    """`nodes` times `gpus` of one kind."""

    name: str
    kind: str  # its name in clusters.yaml; empty for one of the user's own
    nodes: int
    gpus: int
    gpu: Gpu
    usable: float  # bytes of a GPU's memory that a driver leaves to programs
    inside: float
    node_link: float
    host_memory: float  # bytes a node
    host_link: float  # bytes/s between one GPU and its host, one way
    host_bandwidth: float  # bytes/s of a node's memory
    reach: float = 0.8  # share of the peak that the largest matrix products reach
    scale: tuple[float, ...] = ()

    @property
    def world(self) -> int:
        return self.nodes * self.gpus

    def peak(self, precision: str) -> float:
        """FLOP/s of the largest matrix products. Raises UserError where the GPU has no unit for that type."""
        found = self.gpu.peak(precision)
        if found is None:
            raise UserError(f"{self.gpu.name} has no {precision} unit; use train.precision = {' or '.join(self.gpu.peak_flops)}")
        return found * self.reach

    def between(self, nodes: Any) -> Any:
        """Bus bandwidth of a node in a ring over so many nodes."""
        nodes = np.maximum(np.asarray(nodes, dtype=np.float64), 1.0)
        if self.scale:
            places = np.log2(nodes)
            return np.exp(np.interp(places, np.arange(len(self.scale)), np.log(self.scale)))
        return self.node_link * 0.85 * np.maximum(nodes / 2, 1.0) ** -0.15  # links reach about 85 %; see K and K2 in clusters.yaml


def find(asked: str) -> Cluster:
    """`NODESxGPUSxKIND`, `GPUSxKIND`, a YAML file with the keys of clusters.yaml, or `here`. Raises UserError for what is none of them."""
    if match := HERE.fullmatch(asked):
        from megalite.tune import here  # imports torch

        return here.look(int(match[1]) if match[1] else None)
    if asked.endswith((".yaml", ".yml")):
        return _read(Path(asked))
    kinds = table()
    match = PATTERN.fullmatch(asked)
    if not match:
        raise UserError(f"--cluster {asked} is no cluster; write NODESxGPUSxKIND, for instance 8x8xH100, `here`, or name a .yaml file")
    nodes, gpus, kind = int(match[1] or 1), int(match[2]), match[3].lower()
    if kind not in kinds:
        raise UserError(f"--cluster {asked}: no GPU is called {match[3]!r}{suggest(kind, [*kinds])}; there are {', '.join(kinds)}")
    if nodes < 1 or gpus < 1:
        raise UserError(f"--cluster {asked} has no GPUs; nodes and GPUs are 1 or more")
    return build({**kinds[kind], "name": asked, "kind": kind, "nodes": nodes, "gpus": gpus}, source=asked)


def table() -> dict[str, dict[str, Any]]:
    """Kinds by name, as clusters.yaml has them."""
    document = yaml.safe_load((resources.files("megalite.tune") / "clusters.yaml").read_text(encoding="utf-8"))
    return {name.lower(): kind for name, kind in document.items()}


def _read(path: Path) -> Cluster:
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--cluster {path} cannot be read ({error.strerror}); name an existing .yaml file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--cluster {path} is no YAML: {' '.join(str(error).split())}") from None
    if not isinstance(document, dict):
        raise UserError(f"--cluster {path} holds no mapping; it has the keys of a kind in clusters.yaml, and nodes and gpus")
    like = str(document.pop("like", "")).lower()
    if like and like not in table():
        raise UserError(f"--cluster {path}: like = {like}{suggest(like, [*table()])}; there are {', '.join(table())}")
    return build({"name": path.stem, **(table()[like] if like else {}), **document}, source=str(path))


KEYS = ("gpu", "usable_gib", "inside_gbs", "node_link_gbs", "host_memory_gib", "host_link_gbs", "host_bandwidth_gbs")


def build(said: dict[str, Any], *, source: str) -> Cluster:
    """From what clusters.yaml says of a kind, and nodes and gpus. Raises UserError, naming the source, for what is missing or wrong."""
    missing = [key for key in (*KEYS, "nodes", "gpus") if key not in said]
    if missing:
        raise UserError(
            f"{source} says nothing of {', '.join(missing)}; see clusters.yaml, or write `like: h100` to take the rest from there"
        )
    unknown = [key for key in said if key not in (*KEYS, "name", "kind", "nodes", "gpus", "reach", "scale_gbs", "source")]
    if unknown:
        raise UserError(f"{source}: {unknown[0]} is no key of a cluster{suggest(unknown[0], [*KEYS, 'reach', 'scale_gbs'])}")
    gpu = next((gpu for gpu in GPUS if gpu.name == said["gpu"]), None)
    if gpu is None:
        raise UserError(f"{source}: gpu = {said['gpu']!r} is not known; it is one of {', '.join(gpu.name for gpu in GPUS)}")
    for key in (*KEYS[1:], "nodes", "gpus", "reach"):
        if key in said and not (isinstance(said[key], (int, float)) and said[key] > 0):
            raise UserError(f"{source}: {key} = {said[key]!r}, but it is a number above 0")
    scale: Sequence[float] = said.get("scale_gbs", ())
    return Cluster(
        name=said["name"],
        kind=said.get("kind", ""),
        nodes=int(said["nodes"]),
        gpus=int(said["gpus"]),
        gpu=gpu,
        usable=said["usable_gib"] * GIB,
        inside=said["inside_gbs"] * 1e9,
        node_link=said["node_link_gbs"] * 1e9,
        host_memory=said["host_memory_gib"] * GIB,
        host_link=said["host_link_gbs"] * 1e9,
        host_bandwidth=said["host_bandwidth_gbs"] * 1e9,
        reach=said.get("reach", 0.75),
        scale=tuple(value * 1e9 for value in scale),
    )
