"""Images: what the files hold, where they are found, and that nothing is replaced in silence."""

import hashlib
import importlib
import os
import re
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from mbkit.data import demo_points, load_cifar10, load_digits, load_images
from mbkit.data import load as data

PER_FILE = 20  # images in each file of the tests' small CIFAR-10
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def small_and_alone(monkeypatch, tmp_path):
    """A small CIFAR-10, and nothing from the machine that runs the tests: no folder, network or earlier notice."""
    monkeypatch.delenv("MBKIT_OFFLINE", raising=False)
    monkeypatch.delenv("MBKIT_DATA", raising=False)
    monkeypatch.setattr(data, "_URL", "file:///nothing/is/here.tar.gz")
    monkeypatch.setattr(data, "_IMAGES_PER_FILE", PER_FILE)
    monkeypatch.setattr(data, "_usual_roots", lambda: [tmp_path])
    data._say.cache_clear()


def write_cifar10(root: Path) -> dict[str, np.ndarray]:
    """Write the small CIFAR-10 and return it: random records by file name, each `[PER_FILE, 3073]`."""
    rng = np.random.default_rng(0)
    files = {name: rng.integers(256, size=(PER_FILE, 3073), dtype=np.uint8) for name in data._FILES}
    (root / "cifar-10-batches-bin").mkdir(parents=True)
    for name, rows in files.items():
        rows[:, 0] %= 10
        (root / "cifar-10-batches-bin" / name).write_bytes(rows.tobytes())
    return files


@pytest.fixture
def home_page(monkeypatch, tmp_path_factory):
    """Put the small CIFAR-10's archive where data.py downloads from; return the archive."""
    folder = tmp_path_factory.mktemp("home_page")
    write_cifar10(folder)
    archive = folder / "cifar-10-binary.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder / "cifar-10-batches-bin", "cifar-10-batches-bin")
    monkeypatch.setattr(data, "_URL", archive.as_uri())
    monkeypatch.setattr(data, "_MD5", hashlib.md5(archive.read_bytes()).hexdigest())
    return archive


# ---- the digits


def test_digits_are_the_published_ones():
    digits = load_digits()
    labels = torch.cat([digits.labels, digits.test_labels])
    # Counts per class as the UCI repository gives them for this file (optdigits.tes).
    assert labels.bincount().tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert (len(digits.labels), len(digits.test_labels)) == (1415, 382)
    assert digits.test_labels.bincount().min() >= 35
    # The file's first row: 0, 0, 5, 13, 9, 1, 0, 0 of 16.
    row = digits.images[0, 1, 0].reshape(8, 4)
    assert row.eq(row[:, :1]).all()
    assert row[:, 0].tolist() == [value * 255 // 16 for value in (0, 0, 5, 13, 9, 1, 0, 0)]
    assert digits.images.dtype == torch.uint8
    assert digits.images.shape == (1415, 3, 32, 32)
    assert digits.images[:, 0].equal(digits.images[:, 2])
    assert digits.images.is_contiguous()


def test_an_installed_package_has_its_files_and_a_cache(tmp_path, monkeypatch):
    """A wheel has the files in the package, where pyproject.toml puts them, and no checkout beside it."""
    monkeypatch.undo()
    for here, there in re.findall(
        r'^"data/(\S+)" = "mbkit/shipped/(\S+)"', (ROOT / "pyproject.toml").read_text(), re.M
    ):
        assert here == there
        source = ROOT / "data" / here
        shutil.copytree(source, tmp_path / there) if source.is_dir() else shutil.copy(source, tmp_path / there)
    shipped = importlib.import_module("mbkit.data.shipped")
    monkeypatch.setattr(shipped, "IN_WHEEL", tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", "/the/cache")
    monkeypatch.delenv("MBKIT_DATA", raising=False)
    assert "1,415 training and 382 test images" in repr(load_digits())
    assert shipped.shipped("lessons/lenet_cifar10.json").is_relative_to(tmp_path)
    assert any(shipped.shipped("benchmarks/suite").iterdir())
    assert data._usual_roots() == [Path("/the/cache/mbkit")]


@pytest.mark.parametrize("name", ["digits", "cifar10"])
def test_normalized_batches_have_mean_0_and_standard_deviation_1(name, monkeypatch, tmp_path):
    monkeypatch.undo()  # the real CIFAR-10, where the machine has it
    try:
        images = load_images(name, download=False)
    except FileNotFoundError:
        pytest.skip("CIFAR-10 is not on this machine")
    x = torch.cat([x for x, _ in images.subset(1415).batches(500)])
    assert x.mean((0, 2, 3)).abs().max() < 0.05
    assert (x.std((0, 2, 3)) - 1).abs().max() < 0.05
    some = next(iter(images.test_batches(10, dtype=torch.float64)))[0]
    mean, std = torch.tensor([images.mean, images.std], dtype=torch.float64)[..., None, None]
    by_hand = (images.test_images[:10].double() / 255 - mean) / std
    assert torch.allclose(some, by_hand, rtol=0, atol=1e-12)


def test_each_model_may_have_images_of_its_own():
    digits, subsets = load_digits(), torch.tensor([[5, 9, 5], [1, 2, 3]])
    batches = digits.batches(3, seed=[7, 8], dtype=torch.float64, subsets=subsets)
    ((x, y),) = batches
    mean, std = torch.tensor([digits.mean, digits.std], dtype=torch.float64)[..., None, None]
    assert torch.allclose(x, (digits.images[batches.order(0)].double() / 255 - mean) / std, rtol=0, atol=1e-12)
    assert y.equal(digits.labels[batches.order(0)])
    assert batches.order(0).sort().values.tolist() == [[5, 5, 9], [1, 2, 3]]


def test_subset_is_fixed_balanced_and_named():
    digits = load_digits()
    few = digits.subset(150, 30)
    assert few.images.equal(digits.subset(150, 30).images)
    assert few.labels.bincount(minlength=10).max() <= 22  # every tenth image would be a 4 in 30 of 150
    assert (len(few.images), len(few.test_images)) == (150, 30)
    assert "150" in few.name
    assert len(digits.subset(150).test_images) == 382
    for wrong in (0, 1416, 2.5):
        with pytest.raises(ValueError, match="from 1 to 1,415"):
            digits.subset(wrong)


def test_image_data_moves_as_one():
    moved = load_digits().to("meta")
    for tensor in (moved.images, moved.labels, moved.test_images, moved.test_labels):
        assert tensor.device.type == "meta"
    assert moved.name == "digits"


# ---- CIFAR-10 from files


@pytest.mark.parametrize("how", ["parent", "folder", "environment"])
def test_cifar10_files_are_read_as_they_are(how, tmp_path, monkeypatch):
    files = write_cifar10(tmp_path / "here")
    where = {"parent": tmp_path / "here", "folder": tmp_path / "here" / "cifar-10-batches-bin", "environment": None}
    if how == "environment":
        monkeypatch.undo()
        monkeypatch.setattr(data, "_IMAGES_PER_FILE", PER_FILE)
        monkeypatch.setenv("MBKIT_DATA", str(tmp_path / "here"))
    cifar10 = load_cifar10(where[how], download=False)
    rows = np.concatenate(list(files.values()))
    images = torch.cat([cifar10.images, cifar10.test_images])
    assert cifar10.images.shape == (5 * PER_FILE, 3, 32, 32)
    assert np.array_equal(images.numpy().reshape(-1, 3072), rows[:, 1:])
    assert np.array_equal(torch.cat([cifar10.labels, cifar10.test_labels]).numpy(), rows[:, 0])
    assert images.dtype == torch.uint8
    assert cifar10.labels.dtype == torch.int64


def test_copies_are_told_from_the_original(tmp_path, monkeypatch):
    files = write_cifar10(tmp_path)
    assert "copy" in load_cifar10().name
    assert "not the original's" in load_cifar10().note
    for name, rows in files.items():
        monkeypatch.setitem(data._FILES, name, hashlib.sha1(rows.tobytes()).hexdigest())
    assert load_cifar10().name == "CIFAR-10"
    assert "checked" in load_cifar10().note


def truncate(file: Path):
    file.write_bytes(file.read_bytes()[:-1])


def lengthen(file: Path):
    file.write_bytes(file.read_bytes() + b"x")


def foreign(file: Path):
    file.write_bytes(bytes([10]) * file.stat().st_size)


def sparse(file: Path):
    os.truncate(file, 60 << 30)  # 60 GB that take no room, and would not fit into memory


@pytest.mark.parametrize("damage", [truncate, lengthen, foreign, sparse, Path.unlink])
@pytest.mark.parametrize("load", [load_cifar10, load_images])
def test_broken_files_are_an_error_and_never_passed_over(damage, load, tmp_path):
    write_cifar10(tmp_path)
    damage(tmp_path / "cifar-10-batches-bin" / "data_batch_3.bin")
    with pytest.raises(
        ValueError, match=r"Expected 61,460 bytes .*data_batch_3\.bin, got (\d|label 10).*Move its folder away"
    ):
        load()


def test_a_missing_cifar10_without_leave_to_download(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="MBKIT_DATA"):
        load_cifar10(download=False)
    monkeypatch.setenv("MBKIT_OFFLINE", "1")
    with pytest.raises(FileNotFoundError, match=str(tmp_path)):
        load_cifar10()
    monkeypatch.setenv("MBKIT_OFFLINE", "0")
    with pytest.raises(ConnectionError):
        load_cifar10()


# ---- CIFAR-10 from the network


def test_download_is_announced_and_kept(home_page, tmp_path, capsys):
    cifar10 = load_cifar10(tmp_path / "new")
    assert [entry.name for entry in (tmp_path / "new").iterdir()] == ["cifar-10-batches-bin"]
    home_page.unlink()
    again = load_cifar10(tmp_path / "new")  # not asked for again
    assert again.images.equal(cifar10.images)
    told = capsys.readouterr()
    assert told.out.count("Downloading CIFAR-10") == 1
    assert told.err == ""  # no terminal, no bar


@pytest.mark.parametrize("load", [load_cifar10, load_images])
@pytest.mark.parametrize("trouble", ["no network", "wrong checksum", "a folder that cannot be written"])
def test_a_failed_download_is_an_error_or_the_announced_fallback(
    load, trouble, home_page, tmp_path, monkeypatch, capsys
):
    kind, words = ConnectionError, "Expected the archive from file:"
    if trouble == "no network":
        home_page.unlink()
    elif trouble == "wrong checksum":
        monkeypatch.setattr(data, "_MD5", "0" * 32)
        words = "Expected the archive from .* instead of 0000"
    else:
        (tmp_path / "file").touch()  # stops root too, whom permissions do not
        monkeypatch.setattr(data, "_usual_roots", lambda: [tmp_path / "file"])
        kind, words = OSError, "Expected to write "
    before = list(tmp_path.iterdir())
    if load is load_images:
        assert load().name == "digits (in place of CIFAR-10)"
        assert re.search(words, capsys.readouterr().out)
    else:
        with pytest.raises(kind, match=rf"{words}.* MBKIT_DATA"):
            load()
    assert list(tmp_path.iterdir()) == before


# ---- which of the two


def test_auto_prefers_cifar10_and_announces_what_takes_its_place(tmp_path, capsys):
    stand_in = load_images("auto", download=False)
    load_images("auto", download=False)
    told = capsys.readouterr().out
    assert told.count("take its place") == 1  # one notice, however often it is loaded
    assert told.count("\n") == 1
    assert "in place of CIFAR-10" in stand_in.name
    assert "in place of CIFAR-10" in repr(stand_in)
    assert "take the place of CIFAR-10" in stand_in.note
    assert stand_in.images.equal(load_digits().images)
    write_cifar10(tmp_path)
    assert load_images("auto").name.startswith("CIFAR-10")
    assert load_images("digits").name == "digits"
    with pytest.raises(ValueError, match="Did you mean 'cifar10'"):
        load_images("cifar100")


def test_what_is_no_name_or_no_folder_is_refused(monkeypatch):
    with pytest.raises(TypeError, match="Expected the name of a data set, got None: pass 'auto'"):
        load_images(None)
    with pytest.raises(ValueError, match=r"Expected a folder as folder, got '~nobody-here/data': .* Write the"):
        load_cifar10("~nobody-here/data")
    monkeypatch.undo()
    monkeypatch.setenv("MBKIT_DATA", "~nobody-here")
    with pytest.raises(ValueError, match=r"Expected a folder in MBKIT_DATA, got '~nobody-here': "):
        load_images()


# ---- the demo's points


def test_demo_points_are_the_published_ones():
    torch.manual_seed(42)
    X, y = demo_points()
    after = torch.rand(3)
    torch.manual_seed(42)
    expected = torch.randn(100, 8)
    expected[:50, 0] = 2.0
    expected[50:, 1] = 2.0
    assert X.equal(expected)
    assert y.tolist() == [0] * 50 + [1] * 50
    assert torch.rand(3).equal(after)  # and the generator stands where randn leaves it


def test_demo_points_of_more_classes():
    X, y = demo_points(501, 20, 4)
    assert y.bincount().tolist() == [126, 125, 125, 125]
    assert y.equal(y.sort().values)
    assert (X.gather(1, y[:, None]) == 2.0).all()
    assert (X == 2.0).sum() == 501
    with pytest.raises(ValueError, match="4 features for 5 classes"):
        demo_points(100, 4, 5)
