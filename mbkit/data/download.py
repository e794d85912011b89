"""Fetch an archive from the network: whole, checked and unpacked, or not at all."""

from __future__ import annotations

import hashlib
import http.client
import queue
import tarfile
import tempfile
import threading
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path

from ..common.progress import Progress

__all__ = ["fetch_archive"]

_PIECE = 1 << 20  # bytes; what one step of the progress bar stands for


def fetch_archive(
    url: str, md5: str, target: Path, members: Mapping[str, int], *, advice: str = "", patience: float = 10.0
) -> None:
    """Download a .tar.gz, check it, and put its files into `target` in one move.

    Everything happens in a temporary folder beside `target`, which is removed on any failure and on Ctrl-C, so
    `target` is complete or absent. Only the files asked for are unpacked, by their own plain names: nothing in the
    archive can choose where it is written.

    Args:
        url: where the archive is.
        md5: its checksum, in hexadecimal.
        target: the folder to create; its name is also the name of the archive's top folder.
        members: the files wanted from that folder, and each one's size in bytes.
        advice: what the reader of an error can do, added to its message.
        patience: seconds to wait for the first answer, and then for each further piece.

    Raises:
        ConnectionError: no answer, an answer that breaks off, or an archive with another checksum.
        OSError: a folder that cannot be written, or a full disk.
        ValueError: an archive without one of the files, or with one of another size.
    """
    try:
        with _open(url, patience, advice) as response:  # before anything is written: no network, no trace
            target.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=target.name + "-", dir=target.parent) as workplace:
                archive, unpacked = Path(workplace, "archive.tar.gz"), Path(workplace, target.name)
                _save(response, url, md5, archive, advice)
                _unpack(archive, unpacked, members)
                try:
                    unpacked.rename(target)
                except OSError:
                    if not target.is_dir():  # else another process was faster, and its files are as good
                        raise
    except ConnectionError:
        raise
    except OSError as error:
        raise OSError(f"Expected to write {target}, got: {error}. {advice}") from error


def _open(url: str, patience: float, advice: str) -> http.client.HTTPResponse:
    """Open a connection within `patience` seconds, looking up the name included (urlopen's timeout leaves it out)."""
    answers: queue.SimpleQueue = queue.SimpleQueue()

    def ask() -> None:
        try:
            answers.put(urllib.request.urlopen(url, timeout=patience))
        except Exception as error:
            answers.put(error)

    threading.Thread(target=ask, daemon=True).start()
    try:
        answer = answers.get(timeout=patience)
    except queue.Empty:
        answer = TimeoutError(f"silence for {patience:g} seconds")
    if isinstance(answer, (OSError, http.client.HTTPException)):
        raise ConnectionError(f"Expected an answer from {url}, got: {answer}. {advice}") from answer
    if isinstance(answer, Exception):
        raise answer
    return answer


def _save(response: http.client.HTTPResponse, url: str, md5: str, file: Path, advice: str) -> None:
    """Write the response into `file` with a progress bar, and check its md5."""
    digest = hashlib.md5(usedforsecurity=False)
    size = int(response.headers.get("Content-Length", 0)) or None  # in bytes; not every server tells
    with file.open("wb") as out, Progress(size and -(-size // _PIECE), "download, MiB") as bar:
        for piece in _pieces(response, url, advice):
            out.write(piece)
            digest.update(piece)
            bar.advance()
    if digest.hexdigest() != md5:
        raise ConnectionError(
            f"Expected a file with md5 {md5} from {url}, got one with md5 {digest.hexdigest()} "
            f"({file.stat().st_size:,} bytes): the download broke off, or something in between answered. {advice}"
        )


def _pieces(response: http.client.HTTPResponse, url: str, advice: str) -> Iterator[bytes]:
    try:
        while piece := response.read(_PIECE):
            yield piece
    except (OSError, http.client.HTTPException) as error:
        raise ConnectionError(f"Expected the rest of {url}, got: {error!r}. {advice}") from error


def _unpack(archive: Path, folder: Path, members: Mapping[str, int]) -> None:
    """Write the wanted members of `archive` into the new `folder`, each under its plain name."""
    folder.mkdir()
    missing = dict(members)
    with tarfile.open(archive, "r:gz") as tar:
        for member in tar:
            top, _, name = member.name.removeprefix("./").partition("/")
            if top == folder.name and name in missing and member.isfile() and member.size == missing[name]:
                source = tar.extractfile(member)
                with source, Path(folder, name).open("wb") as out:
                    while piece := source.read(_PIECE):
                        out.write(piece)
                del missing[name]
    if missing:
        wanted = ", ".join(f"{folder.name}/{name} ({size:,} bytes)" for name, size in missing.items())
        raise ValueError(f"Expected {wanted} in the downloaded archive, got none: it is another archive.")
