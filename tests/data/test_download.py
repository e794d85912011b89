"""Downloads: a whole, checked folder, or an error within the time allowed and nothing at all."""

import hashlib
import http.server
import io
import socket
import sys
import tarfile
import threading
import time
from pathlib import Path

import pytest

from mbkit.data import download

FILES = {"one.bin": b"1" * 5000, "two.bin": b"2" * 3000}
SIZES = {name: len(content) for name, content in FILES.items()}


def archive(files: dict[str, bytes], kind: bytes = tarfile.REGTYPE) -> bytes:
    """Return a .tar.gz of files, or of links to /etc/passwd."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.type, info.size, info.linkname = kind, len(content), "/etc/passwd"
            tar.addfile(info, io.BytesIO(content))
    return stream.getvalue()


GOOD = archive({f"set/{name}": content for name, content in FILES.items()})


@pytest.fixture
def serve(monkeypatch):
    """Return a function that starts a local server with one answer, and returns its address."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    servers = []

    def start(body: bytes, promised: int | str = 0, status: int = 200, wait: float = 0) -> str:
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                time.sleep(wait)
                self.send_response(status)
                self.send_header("Content-Length", str(promised or len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_):
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.handle_error = lambda *_: None  # the other side has hung up
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}/set.tar.gz"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def fetch(url: str, body: bytes, root: Path, **limits: float) -> None:
    md5, limits = hashlib.md5(body).hexdigest(), {"size": 1 << 20, **limits}
    download.fetch_archive(url, md5, root / "set", SIZES, advice="Do this.", **limits)


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_a_good_archive_becomes_a_folder(serve, tmp_path, capsys):
    fetch(serve(GOOD), GOOD, tmp_path / "new" / "root")
    assert contents(tmp_path / "new" / "root" / "set") == FILES
    assert [entry.name for entry in (tmp_path / "new" / "root").iterdir()] == ["set"]
    assert capsys.readouterr() == ("", "")  # no terminal, no bar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_is_shown_on_a_terminal(serve, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    fetch(serve(GOOD), GOOD, tmp_path)
    assert "download, MiB: 100%" in sys.stderr.getvalue()


BAD_ANSWERS = {  # what the server sends, what was expected of it, and the error
    "wrong checksum": ({"body": GOOD}, b"else", ConnectionError, r"bytes with md5 \w{32} instead of \w{32}.* Do this"),
    "a login page": ({"body": b"<html>Log in"}, GOOD, ConnectionError, r"12 bytes.*something in between.* Do this"),
    "broken off": ({"body": GOOD[:99], "promised": len(GOOD)}, GOOD, ConnectionError, r"broke off|IncompleteRead"),
    "no number as length": ({"body": GOOD, "promised": "abc"}, b"else", ConnectionError, r"with md5 .* Do this"),
    "too long": ({"body": b"0" * (3 << 20), "promised": "-"}, GOOD, ConnectionError, r"more than 1,048,576 bytes. Do"),
    "gone": ({"body": b"", "status": 404}, b"", ConnectionError, r"Expected the archive .* 404.* Do this"),
}


@pytest.mark.parametrize(("answer", "expected", "error", "words"), BAD_ANSWERS.values(), ids=BAD_ANSWERS)
def test_bad_answers_leave_nothing_behind(answer, expected, error, words, serve, tmp_path):
    with pytest.raises(error, match=words):
        fetch(serve(**answer), expected, tmp_path)
    assert list(tmp_path.iterdir()) == []


OTHER_ARCHIVES = {
    "other names": archive({"else/one.bin": FILES["one.bin"], "set/two.bin": FILES["two.bin"]}),
    "other sizes": archive({"set/one.bin": b"1", "set/two.bin": FILES["two.bin"]}),
    "links": archive({f"set/{name}": content for name, content in FILES.items()}, tarfile.SYMTYPE),
}


@pytest.mark.parametrize("body", OTHER_ARCHIVES.values(), ids=OTHER_ARCHIVES)
def test_other_archives_leave_nothing_behind(body, serve, tmp_path):
    with pytest.raises(ValueError, match=r"set/one\.bin \(5,000 bytes\).*another archive"):
        fetch(serve(body), body, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_archive_cannot_choose_where_it_is_written(serve, tmp_path):
    bad = dict.fromkeys(["set/../../escaped", "../escaped", str(tmp_path / "escaped"), "set/sub/one.bin"], b"x" * 5000)
    body = archive({**bad, **{f"./set/{name}": content for name, content in FILES.items()}})
    fetch(serve(body), body, tmp_path / "root")
    assert contents(tmp_path / "root" / "set") == FILES
    assert [entry.name for entry in tmp_path.rglob("*") if "escaped" in entry.name or entry.name == "sub"] == []


def seconds_until_error(url: str, root: Path, patience: float) -> float:
    start = time.monotonic()
    with pytest.raises(ConnectionError, match=r"Expected the archive from .* Do this"):
        fetch(url, GOOD, root, patience=patience)
    assert list(root.iterdir()) == []
    return time.monotonic() - start


def test_no_network_is_an_error_within_the_time_allowed(serve, tmp_path, monkeypatch):
    assert seconds_until_error("http://127.0.0.1:9/nothing-listens", tmp_path, patience=5) < 2
    assert seconds_until_error(serve(GOOD, wait=1), tmp_path, patience=0.2) < 0.8  # it takes the call and is silent
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: time.sleep(1))
    assert seconds_until_error("http://nowhere.invalid/", tmp_path, patience=0.2) < 0.8  # the name service is silent


def test_silence_in_the_middle_is_an_error(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:

        def half():
            call, _ = server.accept()
            call.recv(1000)
            call.sendall(b"HTTP/1.0 200 OK\r\nContent-Length: 5000\r\n\r\nhalf")
            finished.wait(5)
            call.close()

        finished = threading.Event()
        thread = threading.Thread(target=half)
        thread.start()
        with pytest.raises(ConnectionError, match=r"timed out.* Do this"):
            fetch(f"http://127.0.0.1:{server.getsockname()[1]}/", GOOD, tmp_path, patience=0.2)
        finished.set()
        thread.join()
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_download_left_is_removed_by_the_next(serve, tmp_path):
    left = tmp_path / ".set.0123456789abcdef.part"
    left.mkdir()  # without the lock that a living process holds
    (left / "archive.tar.gz").write_bytes(b"half")
    fetch(serve(GOOD), GOOD, tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["set"]


def test_an_interrupted_download_leaves_nothing_behind(serve, tmp_path, monkeypatch):
    def interrupt(content, folder, *_):
        (folder / "one.bin").write_bytes(content[:9])
        raise KeyboardInterrupt

    monkeypatch.setattr(download, "_unpack", interrupt)
    with pytest.raises(KeyboardInterrupt):
        fetch(serve(GOOD), GOOD, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written(serve, tmp_path):
    (tmp_path / "file").write_text("in the way")  # stops root too, whom permissions do not
    with pytest.raises(OSError, match=r"Expected to write .*file/set, got.* Do this"):
        fetch(serve(GOOD), GOOD, tmp_path / "file")
    assert contents(tmp_path) == {"file": b"in the way"}


def test_downloads_at_once_do_not_disturb_each_other(serve, tmp_path):
    url, failures = serve(GOOD), []

    def attempt():
        try:
            fetch(url, GOOD, tmp_path)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=attempt) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert [entry.name for entry in tmp_path.iterdir()] == ["set"]
    assert contents(tmp_path / "set") == FILES
