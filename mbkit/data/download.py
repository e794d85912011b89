"""Fetch an archive from the network: whole, checked and unpacked, or not at all."""

from __future__ import annotations

import hashlib
import http.client
import queue
import tarfile
import threading
import time
import urllib.request
import zlib
from collections.abc import Mapping
from pathlib import Path

from ..common.files import temporary
from ..common.progress import Progress

__all__ = ["fetch_archive"]

_PIECE = 1 << 20  # bytes; what one step of the progress bar stands for


def fetch_archive(
    url: str,
    md5: str,
    target: Path,
    members: Mapping[str, int],
    *,
    size: int,
    advice: str = "",
    patience: float = 10.0,
    slowest: float = 10_000.0,
) -> None:
    """Download a .tar.gz, check it, and put its files into `target` in one move.

    Everything happens in a temporary folder beside `target`, which is removed on any failure and on Ctrl-C, and after
    kill -9 by the next download, so `target` is complete or absent. Only the files asked for are unpacked, by their own
    plain names: nothing in the archive can choose where it is written.

    Args:
        url: where the archive is.
        md5: its checksum, in hexadecimal.
        target: the folder to create; its name is also the name of the archive's top folder.
        members: the files wanted from that folder, and each one's size in bytes.
        size: the most bytes that the archive may have; more are not even written.
        advice: what the reader of an error can do, added to its message.
        patience: seconds to wait for the first answer, and then for each further piece.
        slowest: bytes per second that have to arrive, on average from the start; `patience` is given in addition.

    Raises:
        ConnectionError: no answer, one that breaks off, is too slow or too long, or an archive with another checksum.
        OSError: a folder that cannot be written, or a full disk.
        ValueError: an archive without one of the files, or with one of another size.
    """
    try:
        with _open(url, patience, advice) as response:  # before anything is written: no network, no trace
            target.parent.mkdir(parents=True, exist_ok=True)
            with temporary(target, folder=True) as workplace:
                archive, unpacked = Path(workplace, "archive.tar.gz"), Path(workplace, target.name)
                try:
                    _save(response, md5, archive, size, patience, slowest)
                except (ValueError, http.client.HTTPException, TimeoutError) as error:
                    raise ConnectionError(f"Expected the archive from {url}, got {error!s:.300}. {advice}") from error
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
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise ValueError(f"Expected a .tar.gz from {url}, got an archive that cannot be read: {error}.") from error


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


def _save(response: http.client.HTTPResponse, md5: str, file: Path, most: int, patience: float, slowest: float) -> None:
    """Write the response into `file` with a progress bar, and check its md5.

    Raises:
        ValueError: too much, too slowly, or another checksum.
        TimeoutError, HTTPException: no further piece, or fewer than promised.
    """
    digest, start, got = hashlib.md5(usedforsecurity=False), time.monotonic(), 0
    promised = response.headers.get("Content-Length", "")  # not every server tells, and not every one a number
    size = int(promised) if promised.isascii() and promised.isdigit() else None
    if size is not None and size > most:
        raise ValueError(f"{size:,} bytes instead of at most {most:,}")
    with file.open("wb") as out, Progress(size and -(-size // _PIECE), "download, MiB") as bar:
        while piece := _next_piece(response):
            got, shown = got + len(piece), got // _PIECE
            seconds = time.monotonic() - start
            if got > most:
                raise ValueError(f"more than {most:,} bytes")
            if got < (seconds - patience) * slowest:
                raise ValueError(f"{got:,} bytes in {seconds:.0f} seconds, too slow to wait for the rest")
            out.write(piece)
            digest.update(piece)
            if got // _PIECE > shown or got == size:
                bar.advance()
    if digest.hexdigest() != md5:
        raise ValueError(
            f"{got:,} bytes with md5 {digest.hexdigest()} instead of {md5}: the download broke off, or something in "
            "between answered"
        )


def _next_piece(response: http.client.HTTPResponse) -> bytes:
    """Return what has arrived, at most `_PIECE` bytes: `read` would wait for the whole of it, however slow it drips."""
    try:
        return response.read1(_PIECE)
    except OSError as error:
        raise TimeoutError(f"no further piece: {error!r}") from error


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
