"""Ways in which one party of the chaos benchmark is dishonest, now and then."""

import random
import time
from collections.abc import Callable
from typing import Any

from pellm_lightning import Aggregator
from pellm_lightning.comm.elastic.commit import CommitProtocol
from pellm_lightning.comm.mesh import mesh
from pellm_lightning.comm.mesh.frames import Kind, Link


def lying(aggregator: Aggregator, dice: random.Random) -> None:
    """Claim versions that nobody has made, vote for other results, or not at all; after an honest round."""
    federation: Any = aggregator.federation
    join, vote = federation.join_quorum, CommitProtocol.vote

    def claims(intent: Any, version: Any, metadata: Any, state: str = "") -> Any:
        if version is not None and dice.random() < 0.1:
            version = version._replace(
                round=version.round + dice.randint(0, 3), attempt=version.attempt + 10**6
            )
        return join(intent, version, metadata, state)

    def votes(self: CommitProtocol, view: Any, digest: str, *signed: str) -> Any:
        return vote(self, view, "0" * 64 if aggregator.round and dice.random() < 0.05 else digest, *signed)

    federation.join_quorum = claims
    CommitProtocol.vote = votes  # type: ignore[method-assign]


def dripping(aggregator: Aggregator, dice: random.Random) -> None:
    """Send a byte now and then."""
    send, until, last = Link._send, [0.0], [0.0]

    def drips(self: Link, data: memoryview) -> int:
        now = time.monotonic()
        if now > until[0] and dice.random() < 0.01:
            until[0] = now + 6
        if now > until[0]:
            return send(self, data)
        if now - last[0] < 0.4:
            self.events |= mesh.EVENT_WRITE
            time.sleep(0.01)  # a socket that could take more wakes it at once
            return 0
        last[0] = now
        self.events |= mesh.EVENT_WRITE
        return send(self, data[:1])

    Link._send = drips  # type: ignore[method-assign]


def equivocating(aggregator: Aggregator, dice: random.Random) -> None:
    """Send another sum to some of the members."""
    honest = mesh.Outgoing

    def outgoing(label: Any, data: Any, ready: int | None = None) -> Any:
        out = honest(label, data) if ready is None else honest(label, data, ready)
        if label.kind == Kind.SUM and len(data) and dice.random() < 0.05:
            other = bytearray(data)
            other[0] ^= 1
            out.data, out.ready = memoryview(other), len(other)
        return out

    mesh.Outgoing = outgoing  # type: ignore[assignment, misc]


DISHONEST: dict[str, Callable[[Aggregator, random.Random], None]] = {
    "lying": lying,
    "dripping": dripping,
    "equivocating": equivocating,
    "copying": lambda *_: None,  # the benchmark itself gives it the state of another party
}
