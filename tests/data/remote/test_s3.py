"""Objects of s3:// are read from signed addresses, which no message shows; where those do not serve, s3fs reads."""

from __future__ import annotations

import ssl
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import fsspec.config
import pytest
from s3fs import S3FileSystem
from werkzeug.serving import make_ssl_devcert  # with moto

from pipeline.data.remote.cache import Place
from pipeline.data.remote.shards import Remote
from pipeline.object_store import Absent, Changed, FsspecStore, Info, Refused, StoreError, file_system, open_store
from pipeline.s3_store import S3Store
from tests.checkpoint.object_store import BUCKET, ObjectStore
from tests.data.file_server import Answer
from tests.data.remote.signed_server import KEY, SECRET, SignedServer, give_keys

NAMES = ["plain.tar", "a b.tar", "a+b.tar", "a%20b.tar", "a#b?c.tar", "deep/ä ö/~x=1&y.tar"]
CONTENT = bytes(range(256)) * 400
Opened = Callable[[], S3Store]


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SignedServer]:
    """A bucket with a folder `set` that has all NAMES."""
    for name in NAMES:
        path = tmp_path / "served" / BUCKET / "set" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(CONTENT)
    monkeypatch.setattr("pipeline.object_store.RETRY_SECONDS", (0.01, 0.02))
    with SignedServer(tmp_path / "served") as server:
        environment(monkeypatch, server.url)
        yield server
    S3FileSystem.clear_instance_cache()


def environment(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    found = {"ENDPOINT_URL": endpoint, "ACCESS_KEY_ID": KEY, "SECRET_ACCESS_KEY": SECRET, "DEFAULT_REGION": "us-east-1"}
    for name, value in found.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    S3FileSystem.clear_instance_cache()


@pytest.fixture
def opened() -> Iterator[Opened]:
    with ExitStack() as owned:

        def opened() -> S3Store:
            store = open_store(f"s3://{BUCKET}/set")
            owned.callback(store.close)
            assert isinstance(store, S3Store)
            return store

        yield opened


def fetched(store: FsspecStore, name: str = "plain.tar", begin: int = 0, end: int = len(CONTENT)) -> tuple[bytes, str]:
    buffer = bytearray(end - begin)
    version = store.fetch(name, begin, end, memoryview(buffer))
    return bytes(buffer), version


@pytest.mark.parametrize("name", NAMES)
def test_bytes_and_version_from_a_signed_address(server: SignedServer, opened: Opened, name: str) -> None:
    store = opened()
    assert store.read(name) == CONTENT
    assert fetched(store, name) == (CONTENT, store.info(name).version)
    assert fetched(store, name, 300, 1000)[0] == CONTENT[300:1000]
    assert (server.reads("address"), server.reads("header")) == (3, 0)
    assert len({target for way, _, target in server.targets if way == "address"}) == 1  # it is signed once


def test_an_address_that_has_expired_is_signed_anew(
    server: SignedServer, opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.s3_store.SIGNED_SECONDS", 1)
    store = opened()
    assert fetched(store)[0] == CONTENT
    time.sleep(2.1)  # seconds are whole in an address
    assert fetched(store)[0] == CONTENT
    assert (server.reads("address"), server.reads("header")) == (3, 0)


def test_keys_that_are_changed_in_mid_run(
    server: SignedServer, opened: Opened, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """s3fs asks for its temporary keys where the environment says; the server takes the newest only."""
    keys, config = tmp_path / "keys.json", tmp_path / "config"
    config.write_text(f"[default]\ncredential_process = cat {keys}\n")
    give_keys(keys, KEY, SECRET)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(config))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    store = opened()
    for name in NAMES:
        assert fetched(store, name)[0] == CONTENT
    server.keys = {"AKIDOTHER": "another"}
    give_keys(keys, "AKIDOTHER", "another")
    for name in NAMES:
        assert fetched(store, name)[0] == CONTENT
    assert server.reads("header") == 0
    assert server.reads("address") == 2 * len(NAMES) + 1  # one was refused, all were signed anew


def test_a_store_that_takes_no_signed_addresses(server: SignedServer, opened: Opened) -> None:
    server.signs = False
    store = opened()
    with pytest.warns(UserWarning, match=f"s3://{BUCKET}/set: refuses signed addresses; s3fs reads instead"):
        assert fetched(store)[0] == CONTENT
    refused = server.reads("address")
    assert [fetched(store, name, 5, 900)[0] for name in NAMES] == [CONTENT[5:900]] * len(NAMES)
    assert refused == server.reads("address") == 2


def test_one_object_that_is_refused_to_addresses_only(server: SignedServer, opened: Opened) -> None:
    store = opened()
    assert fetched(store)[0] == CONTENT
    server.signs = False
    assert fetched(store, NAMES[1])[0] == CONTENT
    server.signs, before = True, server.reads("header")
    assert fetched(store)[0] == CONTENT
    assert before == server.reads("header") == 1


def test_through_a_proxy_s3fs_reads(server: SignedServer, opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    """The store is nowhere but behind a proxy, which is the server."""
    environment(monkeypatch, "http://nowhere.invalid")
    monkeypatch.setenv("http_proxy", server.url)
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    assert fetched(opened())[0] == CONTENT
    assert (server.reads("address"), server.reads("header")) == (0, 1)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    environment(monkeypatch, server.url)
    assert fetched(opened())[0] == CONTENT
    assert (server.reads("address"), server.reads("header")) == (1, 1)


@pytest.mark.parametrize(
    ("options", "way"),
    [
        ({"requester_pays": True}, "address"),
        ({"anon": True}, "not"),
        ({"s3_additional_kwargs": {"ServerSideEncryption": "AES256"}}, "address"),  # of writing only
        ({"s3_additional_kwargs": {"SSECustomerKey": "0" * 32, "SSECustomerAlgorithm": "AES256"}}, "header"),
        ({"client_kwargs": {"verify": False}}, "header"),
    ],
)
def test_settings_of_s3fs_hold(
    server: SignedServer, opened: Opened, monkeypatch: pytest.MonkeyPatch, options, way: str
) -> None:
    monkeypatch.setitem(fsspec.config.conf, "s3", options)
    server.anybody = way == "not"
    store = opened()
    assert fetched(store) == (CONTENT, "" if way == "header" else store.info("plain.tar").version)
    assert [found for found, method, _ in server.targets if method == "GET"] == [way]


def test_the_certificates_that_s3fs_trusts_are_trusted(
    server: SignedServer, opened: Opened, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    certificate, key = make_ssl_devcert(str(tmp_path / "own"), host="localhost")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    fault(server, Answer())  # the truth, by other means than sendfile
    monkeypatch.setenv("AWS_CA_BUNDLE", certificate)
    environment(monkeypatch, f"https://localhost:{server.server_port}")
    assert fetched(opened())[0] == CONTENT
    assert (server.reads("address"), server.reads("header")) == (1, 0)


def test_what_passes_is_tried_again(server: SignedServer, opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.object_store.RETRY_SECONDS", (0.01,) * 6)
    faults = [Answer(503), Answer(500), Answer(0), Answer(cut=100), Answer(503)]
    server.fault = lambda asked, count: faults[count] if count < len(faults) else None
    assert fetched(opened())[0] == CONTENT
    assert (server.reads("address"), server.reads("header")) == (6, 0)


FAULTS: dict[str, tuple[Callable[[SignedServer], object], type[StoreError], str]] = {
    "refused": (lambda server: server.keys.clear(), Refused, "access refused .*check this store's credentials"),
    "absent": (lambda server: (server.folder / BUCKET / "set" / NAMES[0]).unlink(), Absent, "plain.tar: .*not there"),
    "down": (lambda server: fault(server, Answer(503)), StoreError, "plain.tar: HTTP 503 .*tried 3 times"),
    "lost": (lambda server: fault(server, Answer(0)), StoreError, "plain.tar: cannot be reached .*tried 3 times"),
    "cut": (lambda server: fault(server, Answer(cut=99)), StoreError, "plain.tar: 99 bytes came .*tried 3 times"),
    "changed": (lambda server: fault(server, Answer(412)), Changed, "plain.tar: HTTP 412 .*not the file that was"),
}


def fault(server: SignedServer, answer: Answer) -> None:
    server.fault = lambda asked, count: answer


@pytest.mark.parametrize("kind", FAULTS)
@pytest.mark.parametrize("served", [False, True])
def test_no_message_shows_an_address(server: SignedServer, opened: Opened, kind: str, served: bool) -> None:
    fail, error, words = FAULTS[kind]
    store = opened()
    if served:
        fetched(store)
    fail(server)
    for read in (fetched, lambda store: store.read("plain.tar")):
        if kind in ("down", "cut") and not served:
            continue  # s3fs then reads, and tries as long as it likes
        with pytest.raises(error, match=rf"^s3://{BUCKET}/set.*{words}") as caught:
            read(store)
        said = "".join(traceback.format_exception(caught.value))
        assert not [secret for secret in ("X-Amz", "Signature", KEY, SECRET) if secret in said]


def test_a_redirect_that_leads_nowhere_shows_no_address(server: SignedServer, opened: Opened) -> None:
    to = Answer(307, location=f"/not here?X-Amz-Credential={KEY}")
    server.fault = lambda asked, count: to if asked.method == "GET" else None
    store = opened()
    http = store._opened(NAMES[0])
    assert http is not None
    with pytest.raises(StoreError, match=rf"^s3://{BUCKET}/set/plain.tar: leads to an address that is none") as caught:
        http.read(NAMES[0])
    assert KEY not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize("keeps", [True, False])
def test_closed_while_bytes_come(server: SignedServer, opened: Opened, keeps: bool) -> None:
    server.keeps = keeps
    store, caught = opened(), []
    assert fetched(store, "plain.tar", 0, 10)[0] == CONTENT[:10]
    server.fault = lambda asked, count: Answer(rate=2000)

    def read() -> None:
        try:
            fetched(store)
        except BaseException as error:
            caught.append(error)

    reading = threading.Thread(target=read, daemon=True)
    reading.start()
    while len(server.asked) < 2:
        time.sleep(0.01)
    time.sleep(0.1)
    store.close()
    reading.join(10)
    [error] = caught
    assert isinstance(error, RuntimeError) and str(error) == "the data set is closed"
    with pytest.raises(RuntimeError):
        fetched(store)


def test_in_a_real_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moto = ObjectStore()
    moto.start()
    try:
        for name, value in moto.environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr("pipeline.object_store.RETRY_SECONDS", (0.01, 0.02))
        as_in_moto(moto, tmp_path)
    finally:
        moto.kill()


def as_in_moto(moto: ObjectStore, cache: Path) -> None:
    for scheme in ("s3", "s3a"):  # its own names for the same
        url = f"{scheme}://{BUCKET}/{scheme}/a set"
        store, plain = open_store(url), FsspecStore(url, ())
        assert isinstance(store, S3Store)
        for number, name in enumerate(NAMES):
            store.write(name, bytes([number]) + CONTENT)
        files, root = file_system(url)
        files.pipe_file(f"{root}/parts.tar", CONTENT * 120, chunksize=5 << 20)
        infos = store.infos()
        assert infos is not None and infos.keys() == {*NAMES, "parts.tar"}
        assert infos["parts.tar"].version.endswith("-3")  # an ETag of several parts
        for name, info in infos.items():
            assert store.read(name) == plain.read(name)
            for begin, end in ((0, info.size), (7, 1007), (info.size - 9, info.size)):
                assert fetched(store, name, begin, end) == (fetched(plain, name, begin, end)[0], info.version)
            assert store.info(name) == info == Info(info.size, info.version)
        assert store._served and store._signs
        store.close()

    remote = Remote(f"s3://{BUCKET}/s3/a set", Place(cache))
    version = remote.info("plain.tar").version
    assert bytes(remote.fetch("plain.tar", version, 1, 300)) == CONTENT[:299]
    remote.store.write("plain.tar", CONTENT)
    with pytest.raises(Changed, match=r"a set/plain.tar: was replaced at its place while it is read"):
        remote.fetch("plain.tar", version, 1, 300)
    moto.kill()
    with pytest.raises(StoreError, match=r"^s3://.*a set/plain.tar: cannot be reached .*tried 3 times") as caught:
        remote.fetch("plain.tar", version, 1, 300)
    assert "Signature" not in "".join(traceback.format_exception(caught.value))
    remote.close()
