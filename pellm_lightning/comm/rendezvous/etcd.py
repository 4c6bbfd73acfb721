"""Client of etcd as a torch ``Store``: in place of our rendezvous server, where there is an etcd already."""

import base64
import math
import weakref
from collections.abc import Sequence
from typing import Any

import requests
import torch.distributed as dist
from typing_extensions import Self, override

from pellm_lightning.comm.errors import FederationError
from pellm_lightning.comm.polling import polls
from pellm_lightning.comm.proxy import Proxy
from pellm_lightning.comm.rendezvous.polling_store import PollingStore, encoded
from pellm_lightning.comm.sockets import split_address
from pellm_lightning.comm.tls import TLS

try:
    import etcd3gw
    from etcd3gw.exceptions import ConnectionFailedError, ConnectionTimeoutError, Etcd3Exception
    from etcd3gw.exceptions import InternalServerError as ServerError
except ImportError as error:
    raise ImportError(
        "A rendezvous at etcd needs the package etcd3gw: pip install 'pellm-lightning[etcd]'."
    ) from error

# etcd's own default for the operations of one transaction.
_MAX_OPERATIONS = 128
_MAX_REASON = 1000
_TEMPORARY = (ConnectionFailedError, ConnectionTimeoutError, ServerError)


class EtcdStore(PollingStore):
    """Client of etcd's HTTP gateway; all keys lie under one prefix.

    Write permissions are those of etcd's roles. Requests to an etcd that is out of reach are retried for
    ``retry_s`` seconds. That does no harm except to ``add``, which is retried once at most and may then have
    counted twice, and to ``delete_key``, which may then return that there was nothing.

    Args:
        address: ``"host:port"`` of etcd.
        tls: Certificate of this party; None for an etcd without TLS. Unlike a rendezvous' certificate, etcd's
            must name the host.
        timeout_s: Seconds that ``get``, ``multi_get`` and ``wait`` wait for a key.
        retry_s: Seconds for which etcd may be out of reach before an error is raised.
        prefix: What all keys begin with, one for each federation.
        proxy: HTTP proxy by which it is reached; None for none.

    Raises:
        ValueError: If an argument is out of range.
        torch.distributed.DistNetworkError: If etcd is out of reach for ``retry_s``.
        FederationError: If it does not admit this party or refuses a request.
    """

    _session: requests.Session | None = None

    def __init__(
        self,
        address: str,
        *,
        tls: TLS | None = None,
        timeout_s: float = 300,
        retry_s: float = 10,
        prefix: str = "pellm_lightning",
        proxy: Proxy | None = None,
    ) -> None:
        super().__init__(address, tls, timeout_s, retry_s, proxy)
        host, port = split_address(address)
        self._prefix = prefix
        self._session = _session(tls, proxy)
        # A forgotten store closes its connections, also while the interpreter ends.
        weakref.finalize(self, self._session.close)
        self._client = etcd3gw.client(
            host,
            port,
            protocol="http" if tls is None else "https",
            timeout=retry_s / 2,  # so that there is time for a retry
            api_path="/v3/",
            session=self._session,
        )
        self.num_keys()  # a party that is not admitted fails here

    @override
    def set(self, key: str, value: str | bytes) -> None:
        self._transact({"success": [self._put(key, encoded(value))]})

    @override
    def try_multi_get(self, keys: Sequence[str]) -> list[bytes | None]:
        found: list[bytes | None] = []
        for at in range(0, len(keys), _MAX_OPERATIONS):
            ranges = [self._range(key) for key in keys[at : at + _MAX_OPERATIONS]]
            found += [_value(response) for response in self._transact({"success": ranges})["responses"]]
        return found

    @override
    def compare_set(self, key: str, expected_value: str | bytes, desired_value: str | bytes) -> bytes:
        expected, desired = encoded(expected_value), encoded(desired_value)
        as_expected = {"target": "VALUE", "value": _text(expected)}
        now: bytes | None = b""
        if not expected:
            now = self._swap({"target": "CREATE", "create_revision": 0}, key, desired)
        if expected or now == b"":  # there is a value, and it may be the one expected
            now = self._swap(as_expected, key, desired)
        return now or b""

    @override
    def add(self, key: str, amount: int) -> int:
        for _ in polls(self._timeout_s):
            found = self._transact({"success": [self._range(key)]})["responses"][0]
            total = int(_value(found) or b"0") + amount
            pairs = found["response_range"].get("kvs", [{}])
            unchanged = {"target": "MOD", "mod_revision": pairs[0].get("mod_revision", 0)}
            if self._swaps(unchanged, key, b"%d" % total, repeats=1).get("succeeded"):
                return total
        raise dist.DistStoreError(f"{key} changes faster than this party can add to it. Add less often.")

    @override
    def delete_key(self, key: str) -> bool:
        answer = self._transact({"success": [{"request_delete_range": {"key": self._key(key)}}]})
        return int(answer["responses"][0]["response_delete_range"].get("deleted", 0)) > 0

    @override
    def num_keys(self) -> int:
        first, beyond = _text(f"{self._prefix}/".encode()), _text(f"{self._prefix}0".encode())
        every = {"request_range": {"key": first, "range_end": beyond, "count_only": True}}
        return int(self._transact({"success": [every]})["responses"][0]["response_range"].get("count", 0))

    @override
    def clone(self) -> Self:
        return type(self)(
            self.address,
            tls=self._tls,
            timeout_s=self._timeout_s,
            retry_s=self._retry_s,
            prefix=self._prefix,
            proxy=self._proxy,
        )

    @override
    def close(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            session.close()

    def _swap(self, condition: dict[str, Any], key: str, value: bytes) -> bytes | None:
        """Set a value if the condition holds for its key; return the one now stored."""
        answer = self._swaps(condition, key, value)
        return value if answer.get("succeeded") else _value(answer["responses"][0])

    def _swaps(
        self, condition: dict[str, Any], key: str, value: bytes, repeats: float = math.inf
    ) -> dict[str, Any]:
        compare = [{"key": self._key(key), "result": "EQUAL", **condition}]
        return self._transact(
            {"compare": compare, "success": [self._put(key, value)], "failure": [self._range(key)]}, repeats
        )

    def _transact(self, transaction: dict[str, Any], repeats: float = math.inf) -> dict[str, Any]:
        """Return etcd's answer; retry at most ``repeats`` times."""
        failure: Exception | None = None
        with self._lock:
            for retries, _ in enumerate(polls(self._retry_s)):
                if self._session is None:
                    failure = OSError("this client was closed")
                    break
                try:
                    answer: dict[str, Any] = dict(self._client.transaction(transaction))
                    return answer
                except _TEMPORARY as error:
                    failure = error
                    if isinstance(error.__context__, requests.exceptions.SSLError):
                        raise self._refused(str(error)) from error
                    if retries >= repeats:
                        break
                except (Etcd3Exception, ValueError) as error:
                    raise self._refused(getattr(error, "detail_text", None) or str(error)) from error
        raise dist.DistNetworkError(
            f"etcd at {self.address} is out of reach: {str(failure) or type(failure).__name__}. It was tried"
            f" for {self._retry_s:g} s. Check"
            " that it runs, that the address is right, and that it and this party use TLS, or neither does."
        ) from failure

    def _refused(self, why: str) -> FederationError:
        return FederationError(
            f"etcd at {self.address} refuses a request: {why[:_MAX_REASON]}. Check the"
            " certificates of both ends, that etcd's names its host, and etcd's own limits and roles."
        )

    def _key(self, key: str) -> str:
        return _text(f"{self._prefix}/{key}".encode())

    def _put(self, key: str, value: bytes) -> dict[str, Any]:
        return {"request_put": {"key": self._key(key), "value": _text(value)}}

    def _range(self, key: str) -> dict[str, Any]:
        return {"request_range": {"key": self._key(key)}}


def _session(tls: TLS | None, proxy: Proxy | None) -> requests.Session:
    session = requests.Session()
    # The environment may name other authorities than the federation's; the proxy is known already.
    session.trust_env = False
    if proxy is not None:
        session.proxies = dict.fromkeys(("http", "https"), proxy.url)
    if tls is not None:
        session.verify = tls.ca
        session.cert = (tls.cert, tls.key)
    return session


def _text(value: bytes) -> str:
    return base64.b64encode(value).decode()


def _value(response: dict[str, Any]) -> bytes | None:
    """Return the value in the answer to a range of one key."""
    pairs = response["response_range"].get("kvs", [])
    return base64.b64decode(pairs[0].get("value", "")) if pairs else None
