"""Client of the rendezvous that survives its restarts, as a torch ``Store``."""

import math
import ssl
import time
from collections.abc import Mapping, Sequence

import torch.distributed as dist
from typing_extensions import override

from pellm_lightning.comm.errors import FederationError
from pellm_lightning.comm.polling import polls
from pellm_lightning.comm.proxy import Proxy, proxy_to
from pellm_lightning.comm.relay.client import RelayAccess
from pellm_lightning.comm.relay.frames import Ticket
from pellm_lightning.comm.rendezvous.channel import Channel, ServerDisconnectedError
from pellm_lightning.comm.rendezvous.frames import (
    DONE,
    FULL,
    MAX_FIELDS,
    REFUSED,
    FrameError,
    Op,
    check_key,
    check_value,
    pack,
    pack_body,
)
from pellm_lightning.comm.rendezvous.polling_store import PollingStore, encoded
from pellm_lightning.comm.tls import TLS

# A server that stops closes connections before it closes its port; one that rejects us does so every time.
_DISCONNECTS = 10
# Longer than any reason of our server.
_MAX_REASON = 1000


class RendezvousStore(PollingStore):
    """A client of a ``RendezvousServer``.

    A lost connection is opened again and the request is retried, for ``retry_s`` seconds. That does no harm
    except to ``add``, which is retried once at most and may then have counted twice, and to ``delete_key``,
    which may then return that there was nothing. Several threads may use one client, but one
    waits while the other is answered; ``clone()`` has a connection of its own.

    Args:
        address: ``"host:port"`` of the server.
        tls: Certificate of this party; None for a server without TLS.
        timeout_s: Seconds that ``get``, ``multi_get`` and ``wait`` wait for a key.
        retry_s: Seconds for which the server may be out of reach, or silent, before an error is raised.
        proxy: HTTP proxy by which it is reached; None for none.

    Raises:
        ValueError: If an argument is out of range; later, if a key or a value is over a limit.
        torch.distributed.DistNetworkError: If the server is out of reach for ``retry_s``.
        torch.distributed.DistStoreError: If it has no room for what this party would write.
        FederationError: If the server does not admit this party, is not the rendezvous, or refuses a request.

    Example::

        store = RendezvousStore("hub:29400")
        store.compare_set("leader", "", "clinic-a")
    """

    _channel: Channel | None = None
    _closed = False

    def __init__(
        self,
        address: str,
        *,
        tls: TLS | None = None,
        timeout_s: float = 300,
        retry_s: float = 10,
        proxy: Proxy | None = None,
    ) -> None:
        super().__init__(address, tls, timeout_s, retry_s, proxy)
        self._context = None if tls is None else tls.client_context
        self.num_keys()  # a party that is not admitted fails here

    @override
    def set(self, key: str, value: str | bytes) -> None:
        self._ask(Op.SET, _key(key), _value(key, value))

    @override
    def try_multi_get(self, keys: Sequence[str]) -> list[bytes | None]:
        found: list[bytes | None] = []
        while len(found) < len(keys):  # the server answers as many as fit into a frame
            rest = keys[len(found) : len(found) + MAX_FIELDS]
            values = self._ask(Op.MULTI_GET, *map(_key, rest))
            if not 1 <= len(values) <= len(rest):
                raise self._no_rendezvous("an answer of the wrong length")
            found += values
        return found

    @override
    def compare_set(self, key: str, expected_value: str | bytes, desired_value: str | bytes) -> bytes:
        expected, desired = _value(key, expected_value), _value(key, desired_value)
        return self._only(self._ask(Op.COMPARE_SET, _key(key), expected, desired))

    @override
    def add(self, key: str, amount: int) -> int:
        return self._number(self._ask(Op.ADD, _key(key), b"%d" % amount, repeats=1))

    @override
    def check(self, keys: list[str]) -> bool:
        parts = [keys[at : at + MAX_FIELDS] for at in range(0, len(keys), MAX_FIELDS)]
        return all(self._ask(Op.CHECK, *map(_key, part)) == [b"1"] * len(part) for part in parts)

    @override
    def delete_key(self, key: str) -> bool:
        return self._number(self._ask(Op.DELETE, _key(key))) == 1

    @override
    def num_keys(self) -> int:
        return self._number(self._ask(Op.NUM_KEYS))

    def transact(self, requests: Sequence[tuple[Op, Sequence[bytes]]]) -> list[list[bytes | None]]:
        """Make requests in one trip; return their answers. If one is refused, nothing is changed.

        An ``EXPECT`` of another value ends it; what follows is not done, and has no answer.

        Args:
            requests: Each an ``Op`` and its fields as bytes: EXPECT, SET, COMPARE_SET, DELETE or MULTI_GET,
                whose answer may lack values that did not fit into a frame.
        """
        fields = self._ask(Op.TRANSACT, *(pack_body(op, given) for op, given in requests))
        answers: list[list[bytes | None]] = []
        while fields and len(answers) < len(requests):
            count = self._number(fields[:1])
            if not 0 <= count < len(fields):
                raise self._no_rendezvous("an answer of the wrong length")
            answers.append(fields[1 : 1 + count])
            fields = fields[1 + count :]
        ended = len(answers) == len(requests) or (answers and requests[len(answers) - 1][0] == Op.EXPECT)
        if fields or not ended:
            raise self._no_rendezvous("an answer of the wrong length")
        for (op, _), answer in zip(requests, answers, strict=False):
            if op in (Op.EXPECT, Op.COMPARE_SET):
                self._only(answer)
        return answers

    def await_change(self, known: Mapping[str, bytes | None], seconds: float) -> list[bytes | None]:
        """Return the values of keys as soon as one is not as it was known, or the time is over.

        Args:
            known: The last known value of each key, None for none.
            seconds: How long to wait at most; the server, too, has a limit.
        """
        seconds = min(seconds, self._retry_s / 4)  # a server that is silent for longer is out of reach
        fields = [field for key, value in known.items() for field in (_key(key), value)]
        values = self._ask(Op.AWAIT, b"%d" % (1000 * seconds), *fields)
        if not 1 <= len(values) <= len(known):
            raise self._no_rendezvous("an answer of the wrong length")
        return values + self.try_multi_get([*known][len(values) :])  # which did not fit into a frame

    def relay_access(self, name: str) -> RelayAccess:
        """Return how a party uses the relay of this rendezvous.

        Args:
            name: This party, as its certificate says if there is one.

        Raises:
            FederationError: If it relays nothing.
        """
        answer = self._ask(Op.TICKET, name.encode())
        text, key = (field or b"" for field in [*answer, None, None][:2])
        return RelayAccess(self.address, Ticket(text, key), self._proxy)

    @override
    def close(self) -> None:
        self._closed = True
        self._disconnect()

    def _ask(self, op: Op, *fields: bytes | None, repeats: float = math.inf) -> list[bytes | None]:
        """Return the answer's fields; retry what may have been received, ``repeats`` times at most."""
        request = pack(op, fields)
        until = time.monotonic() + self._retry_s
        sent = disconnects = 0
        failure: OSError | None = None
        with self._lock:
            for _ in polls(self._retry_s):
                try:
                    channel = self._connected(until)
                    sent += 1
                    return self._done(channel.exchange(request))
                except OSError as error:
                    self._disconnect()
                    failure = error
                    disconnects = disconnects + 1 if isinstance(error, ServerDisconnectedError) else 0
                    if disconnects == _DISCONNECTS:
                        raise self._rejected("it disconnects without an answer") from error
                    if sent > repeats or self._closed:
                        break
                except FrameError as error:
                    self._disconnect()
                    raise self._no_rendezvous(str(error)) from error
                except (
                    FederationError,
                    dist.DistStoreError,
                ):  # the answer is complete, or there is no connection
                    raise
                except BaseException:
                    self._disconnect()  # an answer that comes later must not be taken for the next one's
                    raise
        raise self._out_of_reach(failure) from failure

    def _connected(self, until: float) -> Channel:
        """Return the connection; open one if there is none."""
        if self._closed:
            raise OSError("this client was closed")
        # Half of the time, so that a connection that died silently leaves time for another.
        timeout_s = max(min(self._retry_s / 2, until - time.monotonic()), 0.05)
        if self._channel is None:
            try:
                self._channel = Channel(self.address, self._context, timeout_s, self._proxy)
            except (ssl.SSLEOFError, ssl.SSLZeroReturnError):
                raise  # the server may just be stopping
            except ssl.SSLCertVerificationError as error:
                why = f"its certificate is not accepted: {error.verify_message}"
                raise self._no_rendezvous(why) from error
            except ssl.SSLError as error:
                raise self._rejected(f"it ends the handshake: {error.reason}") from error
        self._channel.set_timeout(timeout_s)
        return self._channel

    def _disconnect(self) -> None:
        channel, self._channel = self._channel, None
        if channel is not None:
            channel.close()

    def _done(self, answer: tuple[int, list[bytes | None]]) -> list[bytes | None]:
        """Return an answer's fields if the request was done."""
        tag, fields = answer
        if tag == DONE:
            return fields
        if tag in (REFUSED, FULL):
            reason = self._only(fields).decode(errors="replace")[:_MAX_REASON]
            if tag == FULL:  # which is waited for as if it was out of reach
                raise dist.DistStoreError(f"The rendezvous at {self.address} has no room: {reason}")
            raise FederationError(f"The rendezvous at {self.address} refuses: {reason}")
        raise FrameError(f"an answer tagged {tag}")

    def _only(self, fields: Sequence[bytes | None]) -> bytes:
        if len(fields) != 1 or fields[0] is None:
            raise self._no_rendezvous("an answer of the wrong length")
        return fields[0]

    def _number(self, fields: Sequence[bytes | None]) -> int:
        try:
            return int(self._only(fields))
        except ValueError as error:
            raise self._no_rendezvous("an answer that is no number") from error

    def _out_of_reach(self, error: OSError | None) -> dist.DistNetworkError:
        return dist.DistNetworkError(
            f"The rendezvous at {self.address} is out of reach{self._identity()}"
            f"{f' through the proxy {self._proxy}' if self._proxy else ''}: {error}. It was tried for"
            f" {self._retry_s:g} s. Check that it runs, that the address is right and the port open, and that"
            " it and all parties use TLS, or none does."
        )

    def _no_rendezvous(self, why: str) -> FederationError:
        return FederationError(
            f"The server at {self.address}{self._identity()} is not this federation's rendezvous: {why}."
            " Check the address, that it and all parties run the same version and use TLS, or none does, and"
            " that all have the same ca.pem."
        )

    def _rejected(self, why: str) -> FederationError:
        return FederationError(
            f"The rendezvous at {self.address} does not admit this party{self._identity()}: {why}. Check that"
            " the name is on its roster, that its authority issued the certificate, and that this has"
            " neither expired nor been revoked."
        )

    def _identity(self) -> str:
        return "" if self._tls is None else f" (as {self._tls.name!r}, by {self._tls.cert})"


def connect(
    url: str,
    tls: TLS | None = None,
    *,
    timeout_s: float = 300,
    retry_s: float = 10,
    proxy: str | None = None,
) -> PollingStore:
    """Return a client of the rendezvous at ``tcp://host:port`` or of the etcd at ``etcd://host:port``.

    Args:
        url: Address of the rendezvous.
        tls: Certificate of this party; None for a server without TLS.
        timeout_s: Seconds that ``get``, ``multi_get`` and ``wait`` wait for a key.
        retry_s: Seconds for which the server may be out of reach before an error is raised.
        proxy: HTTP proxy, or "none"; None takes that of the environment.

    Raises:
        ValueError: If ``url`` is neither, or ``proxy`` is none.
        ImportError: If the package for etcd is missing.
        torch.distributed.DistNetworkError: If the server is out of reach for ``retry_s``.
        FederationError: If the server does not admit this party.
    """
    kind, _, address = url.partition("://")
    if kind == "tcp":
        by = proxy_to(address, proxy)
        return RendezvousStore(address, tls=tls, timeout_s=timeout_s, retry_s=retry_s, proxy=by)
    if kind == "etcd":
        from pellm_lightning.comm.rendezvous.etcd import EtcdStore  # an optional dependency

        by = proxy_to(address, proxy)
        return EtcdStore(address, tls=tls, timeout_s=timeout_s, retry_s=retry_s, proxy=by)
    raise ValueError(f"{url!r} names no rendezvous: give tcp://host:port or etcd://host:port.")


def _key(key: str) -> bytes:
    data = key.encode()
    check_key(data)
    return data


def _value(key: str, value: str | bytes) -> bytes:
    data = encoded(value)
    check_value(key.encode(), data)
    return data
