"""Files below an s3:// URL: s3fs lists, writes and signs, and http_store.py reads from the addresses that it signed.

    name -> signed address, kept for half an hour -> ranges, as from any http server -> bytes, and the ETag they are of

s3fs reads all that is asked for in one event loop, so by one thread; here each thread has a connection of its own. What
s3fs knows still holds: endpoint, region, style of address, certificates, and credentials, which it renews. An address
that is refused is signed anew once, with what s3fs knows by then. What still cannot be read so is read by s3fs itself;
and if no signed address has ever served, so is all that follows.

An address holds a signature and the id of a key: no message shows it.

What it gives up: proxies, certificates of clients, and keys of customers (SSE-C); there s3fs reads.
"""

from __future__ import annotations

import os
import ssl
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any, TypeVar
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from pipeline.http_store import HttpStore
from pipeline.object_store import Absent, Changed, FsspecStore, GivenUp, Passing, StoreError

SIGNED_SECONDS, KEPT_SECONDS = 3600, 1800  # an address serves so long, and is asked for so long
ADDRESSES = 4096  # kept at most
OWN_WAYS = {"proxies", "proxies_config", "client_cert"}  # settings of botocore's

T = TypeVar("T")


class S3Store(FsspecStore):
    """An object_store.Store. Threads may share it."""

    def __init__(self, url: str, pauses: Sequence[float]) -> None:
        super().__init__(url, pauses)
        self._signed = lru_cache(ADDRESSES)(self._sign)
        self._http: HttpStore | None = None
        self._signs, self._served = True, False  # signed addresses are tried; one has been read from
        self._lock, self._closed = threading.Lock(), False

    def read(self, name: str) -> bytes:
        return self._got(name, lambda http: http.read(name), partial(super().read, name))

    def fetch(self, name: str, begin: int, end: int, into: memoryview) -> str:
        otherwise = partial(super().fetch, name, begin, end, into)
        return self._got(name, lambda http: http.fetch(name, begin, end, into), otherwise)

    def close(self) -> None:
        """Hang up; who waits for bytes gets a RuntimeError."""
        self._closed = True
        if self._http is not None:
            self._http.close()

    def _got(self, name: str, get: Callable[[HttpStore], T], otherwise: Callable[[], T]) -> T:
        """What comes from the signed address of a file, else what s3fs reads."""
        refused = False
        while self._signs:
            try:
                http = self._opened(name)
                if http is not None:
                    got, self._served = get(http), True
                    return got
            except (Absent, Changed):
                raise
            except GivenUp as error:
                if self._served or not isinstance(error.__cause__, Passing):
                    raise
                break  # answers, but none that is of use
            except StoreError:
                self._signed.cache_clear()  # keys that have changed are those of all addresses
                if refused:
                    break
                refused = True
                self.info(name)  # so s3fs learns where the bucket is, or says what is wrong
        got = otherwise()
        if self._signs and not self._served:
            self._signs = False
            warnings.warn(f"{self.url}: refuses signed addresses; s3fs reads instead, which is slower", stacklevel=2)
        return got

    def _opened(self, name: str) -> HttpStore | None:
        """What reads signed addresses, of which this file's is the first; None where only s3fs knows the way."""
        with self._lock:
            if self._http is None and self._signs:
                address = self._address(name)
                self._signs = _is_plain(self._files, address)
                if self._signs:
                    headers = {"x-amz-request-payer": "requester"} if self._files.req_kw else {}
                    self._http = HttpStore(self.url, self._pauses, self._address, headers, _trust(self._files, address))
        if self._http is not None and self._closed:
            self._http.close()
        return self._http

    def _address(self, name: str) -> str:
        return self._signed(name, int(time.monotonic() // KEPT_SECONDS))

    def _sign(self, name: str, half_hour: int) -> str:
        """Where a file can be read for an hour by anybody. Raises StoreError."""
        from fsspec.asyn import sync

        async def sign() -> str:
            await self._files.set_session()
            client = await self._files.get_s3(self._files.split_path(self._at(name))[0])
            client.meta.events.register_first("choose-signer.s3.GetObject", _signer, unique_id=__name__)
            return await self._files._url(self._at(name), SIGNED_SECONDS, **self._files.req_kw)

        try:
            return str(sync(self._files.loop, sign))
        except Exception as error:  # of credentials, settings, profiles: s3fs tells it, when it reads
            raise StoreError(f"{self.url}/{name}: cannot be signed ({type(error).__name__})") from None


def _signer(signature_version: object, **_: Any) -> str | None:
    """S3's version 4: botocore signs addresses in old regions by version 2, which young buckets refuse."""
    return "s3v4-query" if signature_version in ("v4-query", "s3v4-query") else None


def _is_plain(files: Any, address: str) -> bool:
    """Whether a GET of this address is all that s3fs would do."""
    proxies = getproxies().keys() - {"no"} and not proxy_bypass(urlsplit(address).netloc)
    options = files._filter_kwargs(files.s3.get_object, files.s3_additional_kwargs)
    return not (
        proxies or options or OWN_WAYS & files.config_kwargs.keys() or files.client_kwargs.get("verify") is False
    )


def _trust(files: Any, address: str) -> ssl.SSLContext | None:
    """The certificates that s3fs trusts. Raises StoreError when they cannot be read."""
    if not address.startswith("https:"):
        return None
    from botocore.httpsession import get_cert_path

    told = files.client_kwargs.get("verify") or files.session.get_config_variable("ca_bundle")
    path = str(get_cert_path(told or os.environ.get("REQUESTS_CA_BUNDLE", True)))
    try:
        return ssl.create_default_context(cafile=path)
    except OSError as error:
        raise StoreError(f"{path}: no certificates ({error})") from None
