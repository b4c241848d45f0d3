"""get_data.sh with a fake ``curl`` in front of it: downloads, mirrors, checks, error lines."""

import os
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest

from fake_sums import FAKE_SUM

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(not shutil.which("bash"), reason="needs bash")
WT2_TOKENS = {"train": 2_088_628, "valid": 217_646, "test": 245_569}

# Serves $SERVED/<last part of the address> from the offset that the partial file has, refuses
# what is not there as curl does (exit 22), and keeps a log of the addresses.
FAKE_CURL = """#!/usr/bin/env bash
while [[ $# -gt 0 ]]; do
  case "$1" in
    --output) out=$2; shift 2 ;;
    --user-agent) agent=$2; shift 2 ;;
    --continue-at | --connect-timeout | --retry) shift 2 ;;
    --*) shift ;;
    *) url=$1; shift ;;
  esac
done
echo "$url" >>"$SERVED/log"
[[ $agent == Mozilla* && -f $SERVED/${url##*/} ]] || { echo "curl: (22) error 404" >&2; exit 22; }
size=0
[[ -f $out ]] && size=$(wc -c <"$out")
tail -c +$((size + 1)) "$SERVED/${url##*/}" >>"$out"
"""


SUMS = {
    "wikitext-2-v1.zip": "542ccefacc6c27f945fb54453812b3cd",
    "simple-examples.tgz": "30177ea32e27c525793142b6bf2c8e2d",
    "text8.zip": "a6640522afe85d1963ad56c05b0ede0a0c000dddc9671758a6cc09b7a38e5232",
}


class Site:
    """A copy of the script in a folder of its own, and the files that the fake network serves."""

    def __init__(self, root: Path):
        self.room, self.served, programs = root / "room", root / "served", root / "bin"
        for folder in (self.room, self.served, programs, root / "scripts"):
            folder.mkdir()
        self.script = shutil.copy(ROOT / "DEQ-Sequence/get_data.sh", self.room)
        shutil.copy(ROOT / "scripts/unpack.py", root / "scripts")
        for name, content in (
            ("curl", FAKE_CURL),
            ("md5sum", FAKE_SUM),
            ("sha256sum", FAKE_SUM),
        ):
            (programs / name).write_text(content)
            (programs / name).chmod(0o755)
        # No pyarrow, whatever this machine has: the second WikiText mirror must say so.
        (programs / "pyarrow.py").write_text("raise ImportError\n")
        path = f"{programs}{os.pathsep}{os.environ['PATH']}"
        self.environment = {
            **os.environ,
            "PATH": path,
            "PYTHONPATH": str(programs),
            "SERVED": str(self.served),
        }

    def declare_published(self, *names: str) -> None:
        """What is served under these names shall have the published checksums."""
        with open(self.served / "sums", "a") as sums:
            for name in names:
                content = (self.served / name).read_bytes()
                done = subprocess.run(["cksum"], input=content, capture_output=True)
                print(done.stdout.decode().replace(" ", "").strip(), SUMS[name], file=sums)

    def run(self, *arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            ["bash", self.script, *arguments],
            cwd=self.served,  # the data belong beside the script, wherever it is called from
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=180,
        )

    def requests(self) -> list[str]:
        log = self.served / "log"
        return log.read_text().split() if log.exists() else []


@pytest.fixture
def site(tmp_path):
    return Site(tmp_path)


def write_wikitext_2(site: Site, missing_words: int = 0) -> Path:
    """An archive with the layout, the token counts and the checksum of WikiText-2."""
    path = site.served / "wikitext-2-v1.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for split, tokens in WT2_TOKENS.items():
            lines, rest = divmod(tokens - missing_words, 10)
            text = (" " + "word " * 9 + "\n") * lines + " \n" * rest
            archive.writestr(f"wikitext-2/wiki.{split}.tokens", text)
    site.declare_published(path.name)
    return path


def last_line(result: subprocess.CompletedProcess) -> str:
    return result.stderr.strip().splitlines()[-1]


def test_wikitext_is_fetched_renamed_checked_and_not_fetched_again(site):
    write_wikitext_2(site)
    first = site.run("wt2")
    assert first.returncode == 0, first.stderr
    place = site.room / "data" / "wikitext-2"
    assert sorted(p.name for p in place.iterdir()) == ["test.txt", "train.txt", "valid.txt"]
    assert "train has 2088628 tokens, as published" in first.stderr
    assert site.requests() == ["https://wikitext.smerity.com/wikitext-2-v1.zip"]

    second = site.run("wt2")
    assert second.returncode == 0
    assert "already complete" in last_line(second)
    assert len(site.requests()) == 1
    assert site.run("check", "wt2").returncode == 0


def test_text_with_wrong_counts_is_refused_and_thrown_away(site):
    write_wikitext_2(site, missing_words=1)
    result = site.run("wt2")
    assert result.returncode == 1
    assert "train has 2088627 tokens, but 2088628 are published" in result.stderr
    assert "no mirror served wt2 as published" in last_line(result)
    assert not list((site.room / "data" / "wikitext-2").iterdir())
    assert not list(site.room.rglob("*.zip"))


def test_download_goes_on_from_a_partial_file(site):
    archive = write_wikitext_2(site)
    downloads = site.room / "data" / "downloads" / "wt2-smerity"
    downloads.mkdir(parents=True)
    (downloads / "wikitext-2-v1.zip.part").write_bytes(archive.read_bytes()[:1000])
    result = site.run("wt2")
    assert result.returncode == 0, result.stderr
    assert len(site.requests()) == 1


def test_error_page_instead_of_an_archive_is_not_kept(site):
    (site.served / "wikitext-2-v1.zip").write_text("<html>moved</html>")
    result = site.run("wt2")
    assert result.returncode == 1
    assert "does not have the published checksum, removed" in result.stderr
    assert not list(site.room.rglob("*.zip"))
    site.declare_published("wikitext-2-v1.zip")  # as if nobody knew the checksum
    result = site.run("wt2")
    assert result.returncode == 1
    assert "was not unpacked, removed" in result.stderr
    assert not list(site.room.rglob("*.zip"))


def test_archive_that_writes_elsewhere(site, tmp_path):
    """Where its checksum is no help: the link is refused, and nothing is written."""
    link = zipfile.ZipInfo("text8")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(site.served / "text8.zip", "w") as archive:
        archive.writestr(link, str(tmp_path / "outside"))
    site.declare_published("text8.zip")
    result = site.run("text8")
    assert result.returncode == 1
    assert "text8.zip holds 'text8', which is no file" in result.stderr
    assert not (tmp_path / "outside").exists()
    assert not list((site.room / "data").glob("text8*/*"))


def test_failed_mirror_falls_to_the_next(site):
    result = site.run("ptb")
    assert result.returncode == 1
    hosts = [url.split("/")[2] for url in site.requests()]
    assert hosts == ["raw.githubusercontent.com", "www.fit.vutbr.cz"]
    assert "no mirror served ptb" in last_line(result)


def test_second_wikitext_mirror_says_what_it_needs(site):
    result = site.run()  # wt103 is the default
    assert result.returncode == 1
    assert site.requests() == ["https://wikitext.smerity.com/wikitext-103-v1.zip"]
    assert "pip install pyarrow" in result.stderr


def test_bytes_are_split_90_5_5(site):
    with zipfile.ZipFile(
        site.served / "text8.zip", "w", zipfile.ZIP_DEFLATED, compresslevel=1
    ) as z:
        z.writestr("text8", b"a" * 90_000_000 + b"b" * 5_000_000 + b"c" * 5_000_000)
    site.declare_published("text8.zip")
    result = site.run("text8")
    assert result.returncode == 0, result.stderr
    for split, byte, size in (("train", b"a", 90), ("valid", b"b", 5), ("test", b"c", 5)):
        text = (site.room / "data" / "text8" / f"{split}.txt").read_bytes()
        assert text == byte * (size * 1_000_000)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("wikitext",),
            "unknown data set 'wikitext': choose one of wt103 wt2 ptb enwik8 text8 all",
        ),
        (("wt2", "ptb"), "give one data set: one of wt103 wt2 ptb enwik8 text8 all"),
        (("check",), "say which data set to check: one of wt103 wt2 ptb enwik8 text8"),
        (("check", "nothing"), "unknown data set 'nothing'"),
        (("check", "wt103"), "wt103 in data/wikitext-103 is not complete: run 'bash get_data.sh"),
    ],
)
def test_misuse_ends_with_one_clear_line(site, arguments, message):
    result = site.run(*arguments)
    assert result.returncode == 1
    assert message in last_line(result)
    assert not site.requests()


def test_check_prints_what_is_there_beside_what_is_published(site):
    place = site.room / "data" / "wikitext-103"
    place.mkdir(parents=True)
    (place / "train.txt").write_text(" \n = a b = \n")
    result = site.run("check", "wt103")
    assert result.returncode == 1
    assert "wt103: train has 6 tokens, but 103227021 are published" in result.stderr
    assert "wt103: train has 4 types, but 267735 are published" in result.stderr
    assert "wt103: data/wikitext-103/valid.txt is missing or empty" in result.stderr
