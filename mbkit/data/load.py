"""Real images: CIFAR-10 where it can be had, handwritten digits where it cannot; and the demo's points."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..common.checks import did_you_mean
from .batches import Batches
from .download import fetch_archive
from .shipped import IN_CHECKOUT, is_installed, shipped

_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
_MD5 = "c32a1d4ab5d03f1284b67883e8d87530"  # as the page beside the archive says
_MOST = 200_000_000  # bytes; the archive has 170,052,171
_FOLDER = "cifar-10-batches-bin"
_FILES = {  # training files in their order, then the test file; SHA-1 of the originals, as recorded by MXNet's gluon
    "data_batch_1.bin": "aadd24acce27caa71bf4b10992e9e7b2d74c2540",
    "data_batch_2.bin": "c0ba65cce70568cd57b4e03e9ac8d2a5367c1795",
    "data_batch_3.bin": "1dd00a74ab1d17a6e7d73e185b69dbf31242f295",
    "data_batch_4.bin": "aab85764eb3584312d3c7f65fd2fd016e36a258e",
    "data_batch_5.bin": "26e2849e66a845b7f1e4614ae70f4889ae604628",
    "test_batch.bin": "67eb016db431130d61cd03c7ad570b013799c88c",
}
_IMAGES_PER_FILE = 10_000
_RECORD = 1 + 3 * 32 * 32  # a label byte, then the red, green and blue planes
_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_ADVICE = f"Unpack {_URL} yourself and let MBKIT_DATA name the folder that then holds {_FOLDER}."


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class ImageData:
    """Images of one size and their labels, in training and test sets, as uint8 on one device.

    Args:
        name: what to call the data in tables and titles; says so when it stands in for other data.
        images: `[N, 3, 32, 32]`, uint8. labels: `[N]`, int64.
        test_images: `[N', 3, 32, 32]`, uint8. test_labels: `[N']`, int64.
        classes: the K classes' names, by label.
        note: where the data is from, and how far it is the original; a sentence or two.
        mean: of the training images per channel, white being 1. std: their standard deviation.

    Example:
        >>> data = load_digits()
        >>> data
        digits: 1,415 training and 382 test images, 3 x 32 x 32, 10 classes
        >>> images, labels = next(iter(data.batches(batch_size=64, seed=1)))
        >>> images.shape, images.dtype, labels.shape
        (torch.Size([64, 3, 32, 32]), torch.float32, torch.Size([64]))
    """

    name: str
    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    classes: tuple[str, ...]
    note: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __repr__(self) -> str:
        shape = " x ".join(map(str, self.images.shape[1:]))
        sizes = f"{len(self.images):,} training and {len(self.test_images):,} test images"
        return f"{self.name}: {sizes}, {shape}, {len(self.classes)} classes"

    def to(self, device: torch.device | str) -> ImageData:
        """Return the same data with its four tensors on `device`."""
        names = ("images", "labels", "test_images", "test_labels")
        return dataclasses.replace(self, **{name: getattr(self, name).to(device) for name in names})

    def subset(self, num_images: int, num_test_images: int | None = None) -> ImageData:
        """Return a fixed random choice of `num_images` training images and, where asked for, test images.

        The choice is the same in every run, and its size goes into the name.
        """
        chosen = _choose(len(self.images), num_images, self.images.device)
        num_test_images = len(self.test_images) if num_test_images is None else num_test_images
        tested = _choose(len(self.test_images), num_test_images, self.images.device)
        training = {"images": self.images[chosen], "labels": self.labels[chosen]}
        test = {"test_images": self.test_images[tested], "test_labels": self.test_labels[tested]}
        return dataclasses.replace(self, name=f"{self.name}, {num_images:,} images", **training, **test)

    def batches(
        self,
        batch_size: int,
        seed: int | Sequence[int] = 0,
        dtype: torch.dtype = torch.float32,
        subsets: Tensor | None = None,
    ) -> Batches:
        """Return the training set in shuffled batches, normalized to mean 0 and standard deviation 1 a channel.

        With one seed per model, or subsets `[M, n]`, each model has its own; see `Batches`.
        """
        transform = self._normalizer(dtype)
        return Batches(self.images, self.labels, batch_size, seed=seed, transform=transform, subsets=subsets)

    def test_batches(self, batch_size: int = 1000, dtype: torch.dtype = torch.float32) -> Batches:
        """Return the test set in its own order, normalized with the training set's numbers."""
        transform = self._normalizer(dtype)
        return Batches(self.test_images, self.test_labels, batch_size, shuffle=False, transform=transform)

    def _normalizer(self, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
        mean, std = torch.tensor([self.mean, self.std], dtype=dtype, device=self.images.device)[..., None, None] * 255
        return lambda images: images.to(dtype).sub_(mean).div_(std)  # [B, 3, 32, 32]


def load_digits() -> ImageData:
    """Return the 1,797 handwritten digits that ship with mbkit, 8 x 8 pixels shown as 3 x 32 x 32.

    Each pixel (0 to 16) becomes a 4 x 4 square of one gray, the same in all channels. In the file's order one writer
    follows another: the first 1,415 images are the training set, and the last 382, by the last three of the fourteen
    groups that scikit-learn's course tells apart, are the test set, so that no writer is in both.
    """
    with np.load(shipped("digits.npz"), allow_pickle=False) as stored:
        small, labels = torch.from_numpy(stored["images"]), torch.from_numpy(stored["labels"]).long()
    gray = (small.to(torch.int32) * 255 // 16).to(torch.uint8)  # [1797, 8, 8]
    gray = gray.repeat_interleave(4, 1).repeat_interleave(4, 2)  # [1797, 32, 32]
    images = gray[:, None].repeat(1, 3, 1, 1)  # [1797, 3, 32, 32]
    return ImageData(
        name="digits",
        images=images[:1415],
        labels=labels[:1415],
        test_images=images[1415:],
        test_labels=labels[1415:],
        classes=tuple("0123456789"),
        note="UCI handwritten digits (Alpaydin and Kaynak, 1998), 8 x 8 pixels shown as 3 x 32 x 32.",
        mean=(0.3046,) * 3,
        std=(0.3755,) * 3,
    )


def load_cifar10(folder: str | os.PathLike | None = None, download: bool = True) -> ImageData:
    """Return CIFAR-10 (Krizhevsky, 2009), read from its binary files.

    Looks in `folder`; without one in the folder that MBKIT_DATA names, then in the checkout's `data/` (of an installed
    wheel: `~/.cache/mbkit`). Where it is in none, it is downloaded into the first of them, checked and unpacked.

    Args:
        folder: the folder that holds `cifar-10-batches-bin`, or that folder itself.
        download: whether to download what is not there (162 MB); MBKIT_OFFLINE=1 in the environment forbids it too.

    Returns:
        50,000 training and 10,000 test images. Files with other checksums than the original's are used, as copies
        decoded from other formats go around, but name and note say so.

    Raises:
        FileNotFoundError: no files, and no download allowed.
        OSError: a download that failed (ConnectionError), or a folder that cannot be written.
        ValueError: files that are truncated or not CIFAR-10's.
    """
    roots = [_folder(folder, "as folder")] if folder is not None else _usual_roots()
    places = [place for root in roots for place in (root / _FOLDER, root)]
    found = next((place for place in places if any((place / name).exists() for name in _FILES)), None)
    if found is None:
        found = places[0]
        if not download or os.environ.get("MBKIT_OFFLINE", "0") not in ("", "0"):
            looked = " and ".join(map(str, roots))
            raise FileNotFoundError(f"Expected {_FOLDER} in {looked}, got neither it nor leave to download. {_ADVICE}")
        _say(f"Downloading CIFAR-10 (162 MB) from {_URL} into {found}")
        sizes = dict.fromkeys(_FILES, _IMAGES_PER_FILE * _RECORD)
        fetch_archive(_URL, _MD5, found, sizes, size=_MOST, advice=_ADVICE)
    return _read_cifar10(found)


def load_images(name: str = "auto", download: bool = True) -> ImageData:
    """Return the images called `name`: "cifar10", "digits", or "auto" for CIFAR-10 where it can be had, else digits.

    What takes CIFAR-10's place is announced in one printed line, and named in the result's `name` and `note`.

    Raises:
        TypeError: a name that is not a text.
        ValueError: another name, or CIFAR-10 files that are broken (those are never passed over in silence).

    Example:
        >>> load_images("digits").classes
        ('0', '1', '2', '3', '4', '5', '6', '7', '8', '9')
    """
    if name == "digits":
        return load_digits()
    if name == "cifar10":
        return load_cifar10(download=download)
    if name != "auto":
        if not isinstance(name, str):
            raise TypeError(f"Expected the name of a data set, got {name!r}: pass 'auto', 'cifar10' or 'digits'.")
        guess = did_you_mean(name, ["auto", "cifar10", "digits"])
        raise ValueError(f"Expected the name of a data set, got {name!r}.{guess}")
    try:
        return load_cifar10(download=download)
    except OSError as error:
        _say(f"CIFAR-10 cannot be had, so the digits that ship with mbkit take its place. {error}")
        data = load_digits()
        note = f"{data.note} They take the place of CIFAR-10."
        return dataclasses.replace(data, name="digits (in place of CIFAR-10)", note=note)


def demo_points(num_samples: int = 100, num_features: int = 8, num_classes: int = 2) -> tuple[Tensor, Tensor]:
    """Return the published demo's points: normal noise in which column k is 2 for every point of class k.

    Draws from torch's default generator exactly what `torch.randn(num_samples, num_features)` draws.

    Args:
        num_samples: N. num_features: F, at least K. num_classes: K, from 1 to N.

    Returns:
        X `[N, F]` and y `[N]` (int64); the classes stand one after the other, in equal blocks where K divides N.

    Example:
        >>> X, y = demo_points(4, 3, 2)
        >>> y.tolist(), X[:2, 0].tolist(), X[2:, 1].tolist()
        ([0, 0, 1, 1], [2.0, 2.0], [2.0, 2.0])
    """
    if not 1 <= num_classes <= min(num_samples, num_features):
        got = f"{num_samples} samples and {num_features} features for {num_classes} classes"
        raise ValueError(f"Expected at least one sample and one feature per class, got {got}.")
    X = torch.randn(num_samples, num_features)
    y = torch.arange(num_samples) * num_classes // num_samples
    X[torch.arange(num_samples), y] = 2.0
    return X, y


def _usual_roots() -> list[Path]:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mbkit"
    own = cache if is_installed() else IN_CHECKOUT
    named = os.environ.get("MBKIT_DATA")
    return [_folder(named, "in MBKIT_DATA"), own] if named else [own]


def _folder(named: str | os.PathLike, where: str) -> Path:
    try:
        return Path(named).expanduser()
    except RuntimeError as error:
        raise ValueError(f"Expected a folder {where}, got {os.fspath(named)!r}: {error} Write the path out.") from None


def _read_cifar10(folder: Path) -> ImageData:
    size, count = _IMAGES_PER_FILE * _RECORD, len(_FILES) * _IMAGES_PER_FILE
    images, labels = torch.empty(count, 3, 32, 32, dtype=torch.uint8), torch.empty(count, dtype=torch.int64)
    original = True
    for part, (name, sha1) in enumerate(_FILES.items()):
        found = (folder / name).stat().st_size if (folder / name).is_file() else 0
        content = (folder / name).read_bytes() if found == size else b""
        records = np.frombuffer(content, np.uint8).reshape(-1, _RECORD) if len(content) == size else None
        if records is None or records[:, 0].max() >= len(_CLASSES):
            got = f"{found:,} bytes" if records is None else f"label {records[:, 0].max()}"
            told = f"Expected {size:,} bytes with labels 0 to 9 in {folder / name}, got {got}: truncated, or another"
            raise ValueError(f"{told} file. Move its folder away, to download it again, or unpack {_URL} there.")
        own = slice(part * _IMAGES_PER_FILE, (part + 1) * _IMAGES_PER_FILE)
        images[own] = torch.tensor(records[:, 1:]).view(-1, 3, 32, 32)
        labels[own] = torch.tensor(records[:, 0])
        original &= hashlib.sha1(content, usedforsecurity=False).hexdigest() == sha1
    cut = len(images) - _IMAGES_PER_FILE
    checked = "checked against the original's checksums"
    copied = "a copy: its checksums are not the original's, so pixels may differ slightly, and the order too"
    return ImageData(
        name="CIFAR-10" if original else "CIFAR-10 (a copy)",
        images=images[:cut],
        labels=labels[:cut],
        test_images=images[cut:],
        test_labels=labels[cut:],
        classes=_CLASSES,
        note=f"CIFAR-10 (Krizhevsky, 2009), {checked if original else copied}.",
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2470, 0.2435, 0.2616),
    )


def _choose(available: int, wanted: int, device: torch.device) -> Tensor:
    if not isinstance(wanted, int) or not 1 <= wanted <= available:
        raise ValueError(f"Expected a number of images from 1 to {available:,}, got {wanted!r}.")
    chosen = np.random.default_rng(0).permutation(available)[:wanted]  # every n-th digit would favor some classes
    return torch.from_numpy(np.sort(chosen)).to(device)


@functools.cache  # once for each text, however often the data is loaded
def _say(text: str) -> None:
    print(text, flush=True)
