"""Where the ranks of one job step meet: a store that rank 0 keeps, on a port that no other job has.

In: a `Place` without a fixed port.  Out: the store, when all ranks are there; or a RankError that names who is missing. Rank 0 listens at
the first free one of the place's ports; the others ask one port after the other whether the store behind it knows their token.
"""

from __future__ import annotations

import logging
import socket
import time
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from megalite.crew import RankError
from megalite.errors import UserError
from megalite.place import Place

LOG = logging.getLogger(__name__)
LOOK = 5.0  # seconds that one port may take to answer
PAUSE = 0.2  # seconds between two looks along the ports


def meet(place: Place, *, patience: float) -> tuple[TCPStore, int]:
    """The store of this step and its port, when every rank is there."""
    until = time.monotonic() + patience
    store, port = _open(place) if place.rank == 0 else _find(place, until=until)
    store.set_timeout(timedelta(seconds=patience))
    if place.rank:
        store.set(f"here/{place.rank}", socket.gethostname())
        store.wait(["all here"], timedelta(seconds=patience))
        return store, port
    missing = set(range(1, place.world))
    while missing and time.monotonic() < until:
        missing -= {rank for rank in missing if store.check([f"here/{rank}"])}
        if missing:
            time.sleep(PAUSE / 4)
    if missing:
        raise RankError(min(missing), _who_is_missing(place, sorted(missing), port, patience))
    store.set("all here", "yes")
    return store, port


def _open(place: Place) -> tuple[TCPStore, int]:
    for port in place.ports:
        try:
            # all addresses of this machine, IPv6 and IPv4: which of them the others come by is not ours to know
            store = TCPStore(place.address, port, is_master=True, wait_for_workers=False)
        except dist.DistError:  # somebody else's
            continue
        store.set(place.token, "yes")
        return store, port
    ports = place.ports
    raise UserError(f"ports {ports[0]} to {ports[-1]} of {place.address} are all taken; set MASTER_PORT to a free one")


def _find(place: Place, *, until: float) -> tuple[TCPStore, int]:
    while time.monotonic() < until:
        for port in place.ports:
            if store := _ask(place, port):
                return store, port
        time.sleep(PAUSE)
    where = f"{place.address}, ports {place.ports[0]} to {place.ports[-1]}"
    raise RankError(place.rank, f"met nobody at {where}: is {place.address} reachable from here, and did its task start?")


def _ask(place: Place, port: int) -> TCPStore | None:
    """The store behind that port, if it is ours."""
    try:
        socket.create_connection((place.address, port), timeout=LOOK).close()  # refused at once, where a store would try again
        store = TCPStore(place.address, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=LOOK))
        return store if store.check([place.token]) else None
    except (OSError, RuntimeError):  # nobody there, or no store
        return None


def _who_is_missing(place: Place, missing: list[int], port: int, patience: float) -> str:
    shown = ", ".join(map(str, missing[:8])) + (" and more" if len(missing) > 8 else "")
    return (
        f"did not come to the meeting point {place.address}:{port} within {patience:g} s; missing: {shown} of {place.world} ranks. "
        "See that every task started, and that no firewall closes the port"
    )
