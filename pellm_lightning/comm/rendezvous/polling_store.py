"""Base of our stores, whose ``get`` and ``wait`` poll: none of torch's requests waits at the server."""

import threading
from collections.abc import Sequence
from datetime import timedelta

import torch.distributed as dist
from typing_extensions import Self

from pellm_lightning.comm.polling import polls
from pellm_lightning.comm.proxy import Proxy
from pellm_lightning.comm.sockets import split_address
from pellm_lightning.comm.tls import TLS


class PollingStore(dist.Store):
    """Torch ``Store`` whose server answers at once, and is retried while it is out of reach; abstract.

    Keep a reference to it while anything uses it: torch itself keeps none to a store written in Python.
    Subclasses also define ``add``, ``delete_key`` and ``num_keys`` of torch's interface.

    Args:
        address: ``"host:port"`` of the server.
        tls: Certificate of this party; None for a server without TLS.
        timeout_s: Seconds that ``get``, ``multi_get`` and ``wait`` wait for a key.
        retry_s: Seconds for which the server may be out of reach before an error is raised.
        proxy: HTTP proxy by which it is reached; None for none.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self, address: str, tls: TLS | None, timeout_s: float, retry_s: float, proxy: Proxy | None = None
    ) -> None:
        if not retry_s > 0:
            raise ValueError(f"retry_s={retry_s} must be positive, in seconds.")
        split_address(address)
        super().__init__()
        self.set_timeout(timedelta(seconds=timeout_s))
        self.address = address
        self._tls, self._retry_s, self._proxy = tls, retry_s, proxy
        self._lock = threading.Lock()

    def set(self, key: str, value: str | bytes) -> None:
        """Set a value."""
        raise NotImplementedError

    def try_multi_get(self, keys: Sequence[str]) -> list[bytes | None]:
        """Return the values, None where there is none."""
        raise NotImplementedError

    def compare_set(self, key: str, expected_value: str | bytes, desired_value: str | bytes) -> bytes:
        """Replace the value if it is ``expected_value``, where "" also stands for none; return the new one.

        That is empty if there is none, unlike in torch's own stores, which then return what was expected. An
        answer that is lost does no harm: a retry finds ``desired_value`` and returns it.
        """
        raise NotImplementedError

    def clone(self) -> Self:
        """Return another client of the same server."""
        return type(self)(
            self.address,
            tls=self._tls,
            timeout_s=self._timeout_s,
            retry_s=self._retry_s,
            proxy=self._proxy,
        )

    def close(self) -> None:
        """Disconnect from the server; idempotent."""
        raise NotImplementedError

    # ---- what follows from it

    def try_get(self, key: str) -> bytes | None:
        """Return the value, None if there is none."""
        return self.try_multi_get([key])[0]

    def check(self, keys: list[str]) -> bool:
        """Return whether all keys have values."""
        return None not in self.try_multi_get(keys)

    def get(self, key: str) -> bytes:
        """Wait for a value and return it.

        Raises:
            torch.distributed.DistStoreError: If there is none within the store's timeout.
        """
        return self.multi_get([key])[0]

    def multi_get(self, keys: list[str]) -> list[bytes]:
        """Wait until all keys have values and return them.

        Raises:
            torch.distributed.DistStoreError: If that takes longer than the store's timeout.
        """
        for _ in polls(self._timeout_s):
            values = self.try_multi_get(keys)
            found = [value for value in values if value is not None]
            if len(found) == len(keys):
                return found
        raise _too_late(keys, self._timeout_s)

    def multi_set(self, keys: list[str], values: list[str | bytes]) -> None:
        """Set values, one after the other."""
        for key, value in zip(keys, values, strict=True):
            self.set(key, value)

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        """Wait until all keys have values.

        Raises:
            torch.distributed.DistStoreError: If that takes longer than ``timeout``, or the store's own.
        """
        timeout_s = self._timeout_s if timeout is None else timeout.total_seconds()
        for _ in polls(timeout_s):
            if self.check(keys):
                return
        raise _too_late(keys, timeout_s)

    def has_extended_api(self) -> bool:
        """Return False: nothing can be appended."""
        return False

    def deleteKey(self, key: str) -> bool:  # torch asks by this name from C++
        """Delete a value; return whether there was one."""
        return self.delete_key(key)

    def getNumKeys(self) -> int:  # torch asks by this name from C++
        """Return the number of keys."""
        return self.num_keys()

    @property
    def _timeout_s(self) -> float:
        # torch keeps it, since set_timeout of a PrefixStore reaches its base class only; its stubs lack it.
        timeout: timedelta = self.timeout  # type: ignore[attr-defined]
        return timeout.total_seconds()


def encoded(value: str | bytes) -> bytes:
    """Return a value as bytes."""
    return value.encode() if isinstance(value, str) else bytes(value)


def _too_late(keys: Sequence[str], timeout_s: float) -> dist.DistStoreError:
    return dist.DistStoreError(
        f"Nobody has set all of {', '.join(keys)} within {timeout_s:g} s. Look at the log of"
        " whoever should have, or set a longer timeout."
    )
