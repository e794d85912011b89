"""Fetch an archive from the network: whole, checked and unpacked, or not at all."""

from __future__ import annotations

import hashlib
import http.client
import io
import queue
import tarfile
import threading
import urllib.request
import zlib
from collections.abc import Mapping
from pathlib import Path

from ..common.files import temporary
from ..common.progress import Progress

_PIECE = 1 << 20  # bytes; what one step of the progress bar stands for


def fetch_archive(
    url: str, md5: str, target: Path, members: Mapping[str, int], *, size: int, advice: str, patience: float = 10.0
) -> None:
    """Download a .tar.gz, check it, and put its files into `target` in one move.

    Nothing is written before the whole archive is there and checked. Its files go into a temporary folder beside
    `target`, which is removed on any failure and on Ctrl-C, and after kill -9 by the next download, so `target` is
    complete or absent. Only the files asked for are unpacked, by their own plain names: nothing in the archive can
    choose where it is written.

    Args:
        url: where the archive is.
        md5: its checksum, in hexadecimal.
        target: the folder to create; its name is also the name of the archive's top folder.
        members: the files wanted from that folder, and each one's size in bytes.
        size: the most bytes that the archive may have; more are not waited for.
        advice: what the reader of an error can do, added to its message.
        patience: seconds to wait for the first answer, and then for anything further.

    Raises:
        ConnectionError: no answer, one that breaks off or is too long, or an archive with another checksum.
        OSError: a folder that cannot be written, or a full disk.
        ValueError: an archive without one of the files, or with one of another size.
    """
    try:
        with _open(url, patience) as response:
            content = _read(response, md5, size)
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise ConnectionError(f"Expected the archive from {url}, got {error!s:.300}. {advice}") from error
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with temporary(target, folder=True) as unpacked:
            _unpack(content, unpacked, target.name, members)
            try:
                unpacked.rename(target)
            except OSError:
                if not target.is_dir():  # else another process was faster, and its files are as good
                    raise
    except OSError as error:
        raise OSError(f"Expected to write {target}, got: {error}. {advice}") from error
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise ValueError(f"Expected a .tar.gz from {url}, got an archive that cannot be read: {error}.") from error


def _open(url: str, patience: float) -> http.client.HTTPResponse:
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
        raise TimeoutError(f"silence for {patience:g} seconds") from None
    if isinstance(answer, Exception):
        raise ConnectionError(str(answer)) from answer
    return answer


def _read(response: http.client.HTTPResponse, md5: str, most: int) -> bytes:
    """Return what the response holds, with a progress bar, once its md5 is checked.

    Raises:
        ValueError: too much, or another checksum.
        OSError: no further piece.
    """
    content = bytearray()
    promised = response.headers.get("Content-Length", "")  # not every server tells, and not every one a number
    size = int(promised) if promised.isascii() and promised.isdigit() else None
    with Progress(size and -(-size // _PIECE), "download, MiB") as bar:
        while piece := response.read(_PIECE):
            content += piece
            if len(content) > most:
                raise ValueError(f"more than {most:,} bytes")
            bar.advance()
    digest = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if digest != md5:
        told = f"{len(content):,} bytes with md5 {digest} instead of {md5}"
        raise ValueError(f"{told}: the download broke off, or something in between answered")
    return bytes(content)


def _unpack(content: bytes, folder: Path, top: str, members: Mapping[str, int]) -> None:
    """Write the wanted members of an archive's folder `top` into `folder`, each under its plain name."""
    missing = dict(members)
    with tarfile.open(fileobj=io.BytesIO(content), mode="r:gz") as tar:
        for member in tar:
            parent, _, name = member.name.removeprefix("./").partition("/")
            if parent == top and name in missing and member.isfile() and member.size == missing[name]:
                Path(folder, name).write_bytes(tar.extractfile(member).read())
                del missing[name]
    if missing:
        wanted = ", ".join(f"{top}/{name} ({size:,} bytes)" for name, size in missing.items())
        raise ValueError(f"Expected {wanted} in the downloaded archive, got none: it is another archive.")
