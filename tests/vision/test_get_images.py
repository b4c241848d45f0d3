"""get_data.sh with a fake network and fake md5 sums, and the command that writes the lists."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from fake_sums import FAKE_SUM
from image_files import settings, write_cifar10, write_cityscapes
from mdeq_vision.command import make_cityscapes_lists
from mdeq_vision.datasets import get_cls_dataset

ROOM = Path(__file__).parents[2] / "MDEQ-Vision"
pytestmark = pytest.mark.skipif(not shutil.which("bash"), reason="needs bash")

# Serves $SERVED/<last part of the address> from the offset that the partial file has, and refuses
# what is not there, or a range behind its end, as curl does (exit 22).
FAKE_CURL = """#!/usr/bin/env bash
while [[ $# -gt 0 ]]; do
  case "$1" in
    --output) out=$2; shift 2 ;;
    --continue-at | --connect-timeout | --retry) shift 2 ;;
    --*) shift ;;
    *) url=$1; shift ;;
  esac
done
echo "$url" >>"$SERVED/log"
file=$SERVED/${url##*/} size=0
[[ -f $out ]] && size=$(wc -c <"$out")
[[ -f $file && $size -lt $(wc -c <"$file") ]] || { echo "curl: (22) error" >&2; exit 22; }
tail -c +$((size + 1)) "$file" >>"$out"
"""

SUMS = {
    "cifar-10-python.tar.gz": "c58f30108f718f92721af3b95e74349a",
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    "test_batch": "40351d587109b95175f43aff81a1287e",
    "ILSVRC2012_img_train.tar": "1d675b47d978889d74fa0da5fadfb00e",
    "ILSVRC2012_img_val.tar": "29b22e2961454d5413ddabcf34fc5622",
    "ILSVRC2012_devkit_t12.tar.gz": "fa75699e90414af021442c21a62c3abf",
    "leftImg8bit_trainvaltest.zip": (
        "3ccff9ac1fa1d80a6a064407e589d747ed0657aac7dc495a4403ae1235a37525"
    ),
    "gtFine_trainvaltest.zip": "40461a50097844f400fef147ecaf58b18fd99e14e4917fb7c3bf9c0d87d95884",
}


class Site:
    """A copy of the room's commands in a folder of its own, a fake network and fake sums."""

    def __init__(self, root: Path):
        self.room, self.served, programs = root / "room", root / "served", root / "bin"
        for folder in (self.room / "tools", self.served, programs, root / "scripts"):
            folder.mkdir(parents=True)
        self.script = shutil.copy(ROOM / "get_data.sh", self.room)
        shutil.copy(ROOM / "tools" / "make_cityscapes_lists.py", self.room / "tools")
        shutil.copy(ROOM.parent / "scripts/unpack.py", root / "scripts")
        sums = {"md5sum": FAKE_SUM, "sha256sum": FAKE_SUM}
        for name, content in {"curl": FAKE_CURL, **sums}.items():
            (programs / name).write_text(content)
            (programs / name).chmod(0o755)
        # The Python that has scipy and mdeq_vision.
        (programs / "python3").write_text(f'#!/usr/bin/env bash\nexec "{sys.executable}" "$@"\n')
        (programs / "python3").chmod(0o755)
        path = f"{programs}{os.pathsep}{os.environ['PATH']}"
        self.environment = {**os.environ, "PATH": path, "SERVED": str(self.served)}

    def declare_published(self, *files: Path) -> None:
        with open(self.served / "sums", "a") as sums:
            for file in files:
                done = subprocess.run(["cksum"], input=file.read_bytes(), capture_output=True)
                print(done.stdout.decode().replace(" ", "").strip(), SUMS[file.name], file=sums)

    def run(self, *arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            ["bash", self.script, *arguments],
            cwd=self.served,  # the data belong beside the script, wherever it is called from
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=180,
        )

    def requests(self) -> int:
        log = self.served / "log"
        return len(log.read_text().split()) if log.exists() else 0


@pytest.fixture
def site(tmp_path):
    return Site(tmp_path)


def last_line(result: subprocess.CompletedProcess) -> str:
    return result.stderr.strip().splitlines()[-1]


# ---- CIFAR-10 ------------------------------------------------------------------------------------


@pytest.fixture
def cifar_site(site, tmp_path):
    folder = write_cifar10(tmp_path / "made", per_batch=10)
    archive = site.served / "cifar-10-python.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, folder.name)
    site.declare_published(archive, *(folder / name for name in SUMS if "batch" in name))
    return site


def test_cifar10_is_fetched_checked_unpacked_and_not_fetched_again(cifar_site):
    first = cifar_site.run("cifar10")
    assert first.returncode == 0, first.stderr
    root = cifar_site.room / "data" / "cifar10"
    model = {"IMAGE_SIZE": [32, 32], "NUM_CLASSES": 10}
    assert len(get_cls_dataset(settings("cifar10", root, MODEL=model), "train")) == 50
    assert sorted(path.name for path in root.parent.iterdir()) == ["cifar10", "downloads"]
    assert not list((root.parent / "downloads").iterdir())

    assert "already complete" in last_line(cifar_site.run("cifar10"))
    assert cifar_site.requests() == 1
    assert cifar_site.run("check", "cifar10").returncode == 0
    (root / "cifar-10-batches-py" / "data_batch_4").write_bytes(b"changed")
    checked = cifar_site.run("check", "cifar10")
    assert checked.returncode == 1
    assert "data_batch_4 does not have the published checksum" in checked.stderr


def test_cifar10_download_goes_on_from_a_partial_file(cifar_site):
    archive = cifar_site.served / "cifar-10-python.tar.gz"
    partial = cifar_site.room / "data" / "downloads" / f"{archive.name}.part"
    partial.parent.mkdir(parents=True)
    partial.write_bytes(archive.read_bytes()[:1000])
    assert cifar_site.run("cifar10").returncode == 0
    assert cifar_site.requests() == 1


def test_cifar10_download_starts_again_where_it_cannot_go_on(cifar_site):
    archive = cifar_site.served / "cifar-10-python.tar.gz"
    partial = cifar_site.room / "data" / "downloads" / f"{archive.name}.part"
    partial.parent.mkdir(parents=True)
    partial.write_bytes(bytes(archive.stat().st_size))
    result = cifar_site.run("cifar10")
    assert result.returncode == 0, result.stderr
    assert "starting again" in result.stderr
    assert cifar_site.requests() == 2


def test_wrong_cifar10_archive_is_thrown_away(cifar_site):
    (cifar_site.served / "cifar-10-python.tar.gz").write_text("<html>moved</html>")
    result = cifar_site.run("cifar10")
    assert result.returncode == 1
    assert "did not serve the published archive" in last_line(result)
    data = cifar_site.room / "data"
    assert not [path for path in data.rglob("*") if path.is_file()]


def test_failed_download_says_how_to_go_on(site):
    result = site.run("cifar10")
    assert result.returncode == 1
    assert "run this script again to go on" in last_line(result)


# ---- ImageNet ------------------------------------------------------------------------------------


def add_bytes(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, BytesIO(content))


def jpeg(shade: int) -> bytes:
    file = BytesIO()
    Image.fromarray(np.full((20, 20, 3), shade, np.uint8)).save(file, "JPEG")
    return file.getvalue()


@pytest.fixture
def archives(site, tmp_path):
    """The three official archives, with two classes and four validation images."""
    folder = tmp_path / "my archives"
    folder.mkdir()
    with tarfile.open(folder / "ILSVRC2012_img_train.tar", "w") as outer:
        for wnid in ("n02", "n01"):
            content = BytesIO()
            with tarfile.open(fileobj=content, mode="w") as inner:
                for i in range(3):
                    add_bytes(inner, f"{wnid}_{i}.JPEG", jpeg(i))
            add_bytes(outer, f"{wnid}.tar", content.getvalue())
    with tarfile.open(folder / "ILSVRC2012_img_val.tar", "w") as tar:
        for i in range(1, 5):
            add_bytes(tar, f"ILSVRC2012_val_{i:08d}.JPEG", jpeg(50 * i))
    # Class 1 is n02 here, class 2 is n01; a third entry is a group of classes.
    synsets = np.array(
        [(1, "n02", 0), (2, "n01", 0), (3, "n03", 2)],
        [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("num_children", "O")],
    )
    meta = BytesIO()
    savemat(meta, {"synsets": synsets})
    with tarfile.open(folder / "ILSVRC2012_devkit_t12.tar.gz", "w:gz") as tar:
        kit = "ILSVRC2012_devkit_t12/data"
        add_bytes(tar, f"{kit}/meta.mat", meta.getvalue())
        add_bytes(tar, f"{kit}/ILSVRC2012_validation_ground_truth.txt", b"1\n2\n2\n1\n")
    site.declare_published(*folder.iterdir())
    return folder


def test_imagenet_archives_become_folders_of_classes(site, archives):
    # A relative folder is one beside the caller, not beside the script.
    result = site.run("imagenet", os.path.relpath(archives, site.served))
    assert result.returncode == 0, result.stderr
    root = site.room / "data" / "imagenet"
    images = root / "images"
    names = sorted(str(path.relative_to(images)) for path in images.rglob("*.JPEG"))
    assert names == [
        *(f"train/{wnid}/{wnid}_{i}.JPEG" for wnid in ("n01", "n02") for i in range(3)),
        "val/n01/ILSVRC2012_val_00000002.JPEG",
        "val/n01/ILSVRC2012_val_00000003.JPEG",
        "val/n02/ILSVRC2012_val_00000001.JPEG",
        "val/n02/ILSVRC2012_val_00000004.JPEG",
    ]
    assert sorted(path.name for path in images.iterdir()) == ["train", "val"]
    cfg = settings("imagenet", root, MODEL={"IMAGE_SIZE": [16, 16]})
    assert len(get_cls_dataset(cfg, "train")) == 6
    again = site.run("imagenet", str(archives))
    assert "train is already there" in again.stderr
    checked = site.run("check", "imagenet")
    assert checked.returncode == 1
    assert "has 6 files *.JPEG, but 1281167 are published" in checked.stderr


def test_damaged_imagenet_archive_leaves_nothing_that_looks_finished(site, archives):
    (archives / "ILSVRC2012_img_train.tar").write_bytes(b"cut off")
    result = site.run("imagenet", str(archives))
    assert result.returncode == 1
    assert "does not have the published checksum" in result.stderr
    site.declare_published(archives / "ILSVRC2012_img_train.tar")
    result = site.run("imagenet", str(archives))
    assert result.returncode == 1
    assert "cannot unpack" in last_line(result)
    assert not (site.room / "data" / "imagenet" / "images" / "train").exists()


# ---- Cityscapes ----------------------------------------------------------------------------------

COUNTS = {"train": 2975, "val": 500, "test": 1525}


def write_city_zips(folder: Path, missing: int = 0) -> None:
    """The two official archives with as many files as the true ones, all of them empty."""
    folder.mkdir()
    for kind, ending in (("leftImg8bit", "leftImg8bit"), ("gtFine", "gtFine_labelIds")):
        with zipfile.ZipFile(folder / f"{kind}_trainvaltest.zip", "w") as archive:
            for split, count in COUNTS.items():
                for i in range(count - missing):
                    name = f"{kind}/{split}/city/city_{i:06d}_000019_{ending}.png"
                    archive.writestr(name, b"")


def test_cityscapes_archives_become_a_tree_with_lists(site, tmp_path):
    write_city_zips(tmp_path / "zips")
    site.declare_published(*(tmp_path / "zips").iterdir())
    result = site.run("cityscapes", str(tmp_path / "zips"))
    assert result.returncode == 0, result.stderr
    data = site.room / "data"
    assert sorted(path.name for path in data.iterdir()) == ["cityscapes", "list"]
    lists = {path.name: path.read_text().splitlines() for path in data.glob("list/*/*")}
    assert {name: len(lines) for name, lines in lists.items()} == {
        "train.lst": 2975,
        "val.lst": 500,
        "trainval.lst": 3475,
        "test.lst": 1525,
    }
    assert site.run("check", "cityscapes").returncode == 0


def test_incomplete_cityscapes_archives_are_refused(site, tmp_path):
    write_city_zips(tmp_path / "zips", missing=1)
    result = site.run("cityscapes", str(tmp_path / "zips"))
    assert result.returncode == 1
    assert "leftImg8bit_trainvaltest.zip does not have the published checksum" in result.stderr
    site.declare_published(*(tmp_path / "zips").iterdir())
    result = site.run("cityscapes", str(tmp_path / "zips"))
    assert result.returncode == 1
    assert "has 2974 files *_leftImg8bit.png, but 2975 are published" in result.stderr
    assert not (site.room / "data" / "cityscapes").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "say which data set: cifar10, imagenet or cityscapes"),
        (("mnist",), "unknown data set 'mnist': choose cifar10, imagenet or cityscapes"),
        (("cifar10", "."), "cifar10 takes no folder"),
        (("imagenet",), "run 'bash get_data.sh imagenet FOLDER'"),
        (("imagenet", "."), "ILSVRC2012_img_train.tar is missing"),
        (("imagenet", "nowhere"), "served/nowhere"),
        (("cityscapes",), "run 'bash get_data.sh cityscapes FOLDER'"),
        (("cityscapes", "."), "leftImg8bit_trainvaltest.zip is missing"),
        (("check",), "say which data set to check"),
        (("check", "mnist"), "unknown data set 'mnist'"),
        (("check", "cityscapes"), "cityscapes in data/cityscapes is not complete"),
    ],
)
def test_misuse_ends_with_one_clear_line(site, arguments, message):
    result = site.run(*arguments)
    assert result.returncode == 1
    assert message in last_line(result)
    assert not site.requests()


def test_archives_that_need_an_account_are_named(site):
    imagenet, cityscapes = (site.run(name).stderr for name in ("imagenet", "cityscapes"))
    for name in SUMS:
        assert ("ILSVRC" not in name) or (name in imagenet)
    assert "leftImg8bit_trainvaltest.zip" in cityscapes
    assert "gtFine_trainvaltest.zip" in cityscapes


# ---- the lists -----------------------------------------------------------------------------------


def test_lists_pair_images_with_labels(tmp_path, monkeypatch, capsys):
    root = write_cityscapes(tmp_path / "data", n_train=3, n_val=1, n_test=1)
    shutil.rmtree(root / "list")
    monkeypatch.chdir(tmp_path)
    assert make_cityscapes_lists([]) == 0  # data/ is the default
    assert "train.lst: 3 images" in capsys.readouterr().out
    lists = {path.stem: path.read_text().splitlines() for path in root.glob("list/*/*.lst")}
    assert lists["val"] == [
        "leftImg8bit/val/frankfurt/frankfurt_000000_000019_leftImg8bit.png\t"
        "gtFine/val/frankfurt/frankfurt_000000_000019_gtFine_labelIds.png"
    ]
    assert lists["test"] == ["leftImg8bit/test/berlin/berlin_000000_000019_leftImg8bit.png"]
    assert lists["train"] == sorted(lists["train"])
    assert lists["trainval"] == lists["train"] + lists["val"]


def test_lists_of_an_incomplete_tree_are_not_written(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    root = write_cityscapes(tmp_path / "data")
    shutil.rmtree(root / "list")
    labels = root / "cityscapes/gtFine/val/frankfurt/frankfurt_000000_000019_gtFine_labelIds.png"
    labels.unlink()
    for arguments, words in (
        ([], f"labels {labels.relative_to(tmp_path)} do not exist (1 of 2"),
        (["nowhere"], "no images nowhere/cityscapes/leftImg8bit/train"),
    ):
        assert make_cityscapes_lists(arguments) == 2
        message = capsys.readouterr().err
        assert words in message
        assert "bash get_data.sh cityscapes" in message
        assert len(message.splitlines()) == 1
    assert not (root / "list").exists()
