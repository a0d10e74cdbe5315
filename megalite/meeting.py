"""Where the ranks of one job step meet: a store that rank 0 keeps, found by a door that no other job has.

In: a `Place` without a fixed port.  Out: the store, when all ranks are there; or a RankError that names who is missing. Rank 0 opens a door
at the first free one of the place's ports: whoever knocks is told the token of this step and the port of the store. The others knock at
one port after the other until they hear their own token. (A TCPStore alone would not do: a client that meets something else than a store
may wait there for good.)
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from datetime import timedelta

from torch.distributed import TCPStore  # type: ignore[attr-defined]

from megalite.crew import RankError
from megalite.errors import UserError
from megalite.place import Place

LOOK = 3.0  # seconds that whoever is behind a door may take to answer
PAUSE = 0.2  # seconds between two looks along the ports
LONGEST = 4096  # bytes of an answer


def meet(place: Place, *, patience: float) -> tuple[TCPStore, int]:
    """The store of this step and its port, when every rank is there."""
    until = time.monotonic() + patience
    if place.rank:
        port = _knock(place, until=until)
        store = TCPStore(place.address, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=patience))
        store.set(f"here/{place.rank}", "yes")
        store.wait(["all here"], timedelta(seconds=patience))
        return store, port
    store = TCPStore(place.address, 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=patience))
    missing = set(range(1, place.world))
    with _door(place, store.port):
        while missing and time.monotonic() < until:
            missing -= {rank for rank in missing if store.check([f"here/{rank}"])}
            if missing:
                time.sleep(PAUSE / 4)
    if missing:
        raise RankError(min(missing), _who_is_missing(place, sorted(missing), patience))
    store.set("all here", "yes")
    return store, store.port


@contextlib.contextmanager
def _door(place: Place, port: int) -> Iterator[None]:
    """Answer whoever knocks, until all are there."""
    server = _open(place)
    answer = f"{place.token} {port}\n".encode()

    def attend() -> None:
        while True:
            try:
                guest, _ = server.accept()
            except OSError:  # closed
                return
            with guest, contextlib.suppress(OSError):
                guest.sendall(answer)

    threading.Thread(target=attend, name="door", daemon=True).start()
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            server.shutdown(socket.SHUT_RDWR)  # wakes the thread
        server.close()


def _open(place: Place) -> socket.socket:
    for port in place.ports:
        with contextlib.suppress(OSError):  # somebody else's
            # all addresses of this machine: which of them the others come by is not ours to know
            if socket.has_dualstack_ipv6():
                return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
            return socket.create_server(("", port), backlog=1024)
    ports = place.ports
    raise UserError(f"ports {ports[0]} to {ports[-1]} of {place.address} are all taken; set MASTER_PORT to a free one")


def _knock(place: Place, *, until: float) -> int:
    """The port of our store."""
    while time.monotonic() < until:
        for door in place.ports:
            said = _ask(place.address, door)
            token, _, port = said.rpartition(" ")
            if token == place.token:
                return int(port)
        time.sleep(PAUSE)
    where = f"{place.address}, ports {place.ports[0]} to {place.ports[-1]}"
    raise RankError(place.rank, f"met nobody at {where}: is {place.address} reachable from here, and did its task start?")


def _ask(host: str, port: int) -> str:
    """What is said at that door: a line, or nothing."""
    said = b""
    with contextlib.suppress(OSError), socket.create_connection((host, port), timeout=LOOK) as guest:
        until = time.monotonic() + LOOK
        while not said.endswith(b"\n") and len(said) < LONGEST and time.monotonic() < until:
            part = guest.recv(LONGEST)
            if not part:
                break
            said += part
    return said.decode(errors="replace").strip()


def _who_is_missing(place: Place, missing: list[int], patience: float) -> str:
    shown = ", ".join(map(str, missing[:8])) + (" and more" if len(missing) > 8 else "")
    return (
        f"did not come to the meeting point on {place.address} within {patience:g} s; missing: {shown} of {place.world} ranks. "
        "See that every task started, and that no firewall closes the ports"
    )
