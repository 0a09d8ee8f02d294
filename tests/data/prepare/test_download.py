"""Archives over HTTP: it goes on where it broke off, and gives up soon."""

import hashlib
import socket
import threading
import time

import pytest

from flax_resnetv2 import RunError, UsageError
from flax_resnetv2.data.prepare import download, write_tfds
from tests.support.archives import Server, binary_members, prepare, write_tar


@pytest.fixture
def server(tmp_path):
    content = write_tar(tmp_path / "a.tar.gz", binary_members()).read_bytes()
    with Server(content) as s:
        threading.Thread(target=s.serve_forever, args=(0.01,), daemon=True).start()
        yield s
        s.shutdown()


def test_a_download_that_broke_off_goes_on(tmp_path, server):
    server.break_at = len(server.content) // 2
    with pytest.raises(RunError, match=r"broke off at .*--data.archive"):
        prepare(tmp_path / "data", url=server.url)
    server.break_at = None
    prepare(tmp_path / "data", url=server.url)
    assert server.asked == ["bytes=0-", f"bytes={len(server.content) // 2}-"]
    assert server.sent == len(server.content)
    assert not list((tmp_path / "data" / "downloads").glob("cifar*"))


def test_a_server_without_ranges_is_asked_from_the_start(tmp_path, server):
    server.break_at, server.ranges = 1000, False
    with pytest.raises(RunError, match="broke off"):
        prepare(tmp_path / "data", url=server.url)
    server.break_at = None
    assert prepare(tmp_path / "data", url=server.url).is_dir()


def test_another_checksum_from_a_mirror_is_refused_and_removed(tmp_path, server):
    with pytest.raises(UsageError, match="accept-checksum"):
        write_tfds.prepare("cifar10", tmp_path, url=server.url)
    assert not list((tmp_path / "downloads").glob("cifar*"))


def test_no_network_is_one_clear_line_soon(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/x.tar.gz"
        began = time.monotonic()
        with pytest.raises(RunError) as caught:
            prepare(tmp_path, url=url)
    assert time.monotonic() - began < 20
    for way in ("--data.archive", "--data.url", "--data.dir", "quickstart"):
        assert way in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_name_that_is_looked_up_for_long_is_left(tmp_path, monkeypatch):
    monkeypatch.setattr(download, "TIMEOUT", 0.1)
    released = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: released.wait(5) and [])
    with pytest.raises(RunError, match=r"no answer within 0.2 s\).*--data.archive"):
        prepare(tmp_path, url="http://slow.invalid/x.tar.gz")
    released.set()


@pytest.mark.parametrize(
    ("answer", "message", "kept"),
    [
        (b"", "timed out", 0),
        (
            b"HTTP/1.0 200 OK\r\nContent-Length: 9\r\n\r\n\x1f\x8bc",
            "timed out.*3 bytes",
            3,
        ),
        (b"garbage\r\n\r\n", r"\(garbage\)", 0),
        (b"HTTP/1.0 404 Not Found\r\n\r\n", "Not Found", 0),
    ],
    ids=["silent", "stalls", "garbage", "404"],
)
def test_a_server_that_fails_is_left(tmp_path, monkeypatch, answer, message, kept):
    monkeypatch.setattr(download, "TIMEOUT", 0.3)

    def serve():
        connection, _ = listening.accept()
        with connection:
            connection.recv(4096)
            connection.sendall(answer)
            done.wait(5)

    done = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=serve)
        thread.start()
        url = f"http://127.0.0.1:{listening.getsockname()[1]}/x.tar.gz"
        with pytest.raises(RunError, match=message) as caught:
            prepare(tmp_path, url=url)
        done.set()
        thread.join()
    assert "\n" not in str(caught.value)
    partial = list((tmp_path / "downloads").glob("*.partial"))
    assert sum(path.stat().st_size for path in partial) == kept


def test_what_is_no_address_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"data.url=mirror is no address.*https://"):
        prepare(tmp_path, url="mirror")


def test_a_damaged_download_is_fetched_again(tmp_path, server):
    whole = server.content
    server.content = b"\x1f\x8bnot an archive"
    with pytest.raises(UsageError, match="no CIFAR-10 archive"):
        prepare(tmp_path / "data", url=server.url)
    server.content = whole
    assert prepare(tmp_path / "data", url=server.url).is_dir()


def partials(root):
    return [path.stat().st_size for path in (root / "downloads").glob("*.partial")]


def test_a_page_in_place_of_the_archive_is_told_and_not_kept(tmp_path, server):
    whole, server.content = server.content, b"<html>Please log in</html>"
    server.kind = "text/html"
    with pytest.raises(
        RunError, match=r"no archive but text/html; .*a login"
    ) as caught:
        prepare(tmp_path / "data", url=server.url)
    assert "\n" not in str(caught.value)
    assert not partials(tmp_path / "data")
    server.content = whole
    assert prepare(tmp_path / "data", url=server.url).is_dir()


def test_a_page_does_not_take_the_place_of_what_has_come(tmp_path, server):
    whole, server.break_at = server.content, 1000
    with pytest.raises(RunError, match="broke off"):
        prepare(tmp_path / "data", url=server.url)
    server.ranges, server.content, server.break_at = False, b"<html>", None
    with pytest.raises(RunError, match=r"login.*; 1,000 bytes are kept"):
        prepare(tmp_path / "data", url=server.url)
    server.ranges, server.content = True, whole
    assert prepare(tmp_path / "data", url=server.url).is_dir()
    assert server.asked[-1] == "bytes=1000-"


def test_an_empty_answer_is_no_archive(tmp_path, server):
    server.content = b""
    with pytest.raises(RunError, match="no archive"):
        prepare(tmp_path, url=server.url)
    assert not partials(tmp_path)


def test_what_is_larger_than_the_archive_can_be_is_not_kept(
    tmp_path, server, monkeypatch
):
    monkeypatch.setattr(download, "LARGEST", 50_000)
    with pytest.raises(RunError, match="more than 50,000 bytes, the limit"):
        prepare(tmp_path, url=server.url)
    assert sum(partials(tmp_path)) == 0


def test_a_full_disk_is_not_called_a_bad_connection(tmp_path, server):
    # The kernel's own full disk stands where the download would lie.
    digest = hashlib.sha256(server.url.encode()).hexdigest()[:8]
    partial = tmp_path / "downloads" / f"cifar-10-{digest}.partial"
    partial.parent.mkdir()
    partial.symlink_to("/dev/full")
    with pytest.raises(RunError, match=r"there is no room .No space left") as caught:
        prepare(tmp_path, url=server.url)
    assert "cannot download" not in str(caught.value)
    assert [path.name for path in partial.parent.iterdir()] == [partial.name]
