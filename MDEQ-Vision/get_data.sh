#!/usr/bin/env bash
# Put the image data sets into ./data beside this script.
#
#   bash get_data.sh cifar10              fetch CIFAR-10 (163 MB)
#   bash get_data.sh imagenet [FOLDER]    unpack the official archives that lie in FOLDER;
#   bash get_data.sh cityscapes [FOLDER]  without FOLDER: say which archives, and where from
#   bash get_data.sh check NAME           only check what is there; no network
#
# ImageNet and Cityscapes may only be downloaded with an account of one's own. A data set is put in
# place only when it is complete: until then it lies in a folder whose name ends in .part. The
# handwritten digits and the digit scenes need no download.
set -euo pipefail
CALLED_FROM=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")"

NAMES="cifar10, imagenet or cityscapes"
CIFAR_ADDRESS=https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz
CIFAR_FOLDER=cifar-10-batches-py

say() { echo "get_data.sh: $*" >&2; }
fail() { say "$*"; exit 1; }

# ---- checking ----------------------------------------------------------------------------------

# One line per file: checksum, name. 32 digits are an MD5, 64 a SHA-256.
published_sums() {
  echo "c58f30108f718f92721af3b95e74349a cifar-10-python.tar.gz"
  echo "c99cafc152244af753f735de768cd75f data_batch_1"
  echo "d4bba439e000b95fd0a9bffe97cbabec data_batch_2"
  echo "54ebc095f3ab1f0389bbae665268c751 data_batch_3"
  echo "634d18415352ddfa80567beed471001a data_batch_4"
  echo "482c414d41f54cd18b22e5b47cb7c3cb data_batch_5"
  echo "40351d587109b95175f43aff81a1287e test_batch"
  echo "1d675b47d978889d74fa0da5fadfb00e ILSVRC2012_img_train.tar"
  echo "29b22e2961454d5413ddabcf34fc5622 ILSVRC2012_img_val.tar"
  echo "fa75699e90414af021442c21a62c3abf ILSVRC2012_devkit_t12.tar.gz"
  echo "3ccff9ac1fa1d80a6a064407e589d747ed0657aac7dc495a4403ae1235a37525 leftImg8bit_trainvaltest.zip"
  echo "40461a50097844f400fef147ecaf58b18fd99e14e4917fb7c3bf9c0d87d95884 gtFine_trainvaltest.zip"
}

# sum_of FILE SUM: the checksum of FILE of the same kind as SUM.
sum_of() {
  local kind=(sha256sum) other=(shasum -a 256)
  [[ ${#2} == 64 ]] || kind=(md5sum) other=(md5 -q)
  command -v "${kind[0]}" >/dev/null || kind=("${other[@]}")
  "${kind[@]}" <"$1" | cut -d ' ' -f 1
}

# has_sum FILE: its checksum is the published one. FILE may end in .part.
has_sum() {
  local name=${1##*/} wanted
  wanted=$(published_sums | grep " ${name%.part}\$" | cut -d ' ' -f 1)
  [[ $(sum_of "$1" "$wanted") == "$wanted" ]]
}

# as_published FILE: the same, in words.
as_published() {
  if [[ ! -s $1 ]]; then
    say "$1 is missing or empty"
    return 1
  elif has_sum "$1"; then
    say "$1 has the published checksum"
  else
    say "$1 does not have the published checksum"
    return 1
  fi
}

# count FOLDER ENDING PUBLISHED: that many files below FOLDER.
count() {
  local actual=0
  [[ ! -d $1 ]] || actual=$(find "$1" -type f -name "*$2" | wc -l | tr -d ' ')
  if [[ $actual == "$3" ]]; then
    say "$1 has $actual files *$2, as published"
  else
    say "$1 has $actual files *$2, but $3 are published"
    return 1
  fi
}

# check NAME FOLDER: print what is there beside what is published; non-zero if it differs.
check() {
  local file status=0
  case "$1" in
    cifar10)
      for file in data_batch_{1..5} test_batch; do
        as_published "$2/$CIFAR_FOLDER/$file" || status=1
      done
      ;;
    imagenet)
      count "$2/images/train" .JPEG 1281167 || status=1
      count "$2/images/val" .JPEG 50000 || status=1
      ;;
    cityscapes)
      count "$2/leftImg8bit/train" _leftImg8bit.png 2975 || status=1
      count "$2/leftImg8bit/val" _leftImg8bit.png 500 || status=1
      count "$2/leftImg8bit/test" _leftImg8bit.png 1525 || status=1
      count "$2/gtFine/train" _gtFine_labelIds.png 2975 || status=1
      count "$2/gtFine/val" _gtFine_labelIds.png 500 || status=1
      ;;
    *) fail "unknown data set '$1': choose $NAMES" ;;
  esac
  return "$status"
}

# ---- archives ------------------------------------------------------------------------------------

# unpack ARCHIVE FOLDER GIGABYTES: into a new FOLDER; links, paths to other places, and archives
# that unfold into more are refused.
unpack() {
  rm -rf "$2"
  python3 ../scripts/unpack.py "$1" "$2" "$3" || fail "cannot unpack $1: download it again"
}

# ---- CIFAR-10 ----------------------------------------------------------------------------------

# download URL FILE: go on from what FILE already holds.
download() {
  if command -v curl >/dev/null; then
    local progress=(--silent --show-error)
    [[ -t 2 ]] && progress=(--progress-bar)
    curl --fail --location "${progress[@]}" --connect-timeout 30 --retry 2 \
      --continue-at - --output "$2" "$1"
  elif command -v wget >/dev/null; then
    wget --quiet --timeout=30 --tries=3 --continue --output-document="$2" "$1"
  else
    fail "neither curl nor wget is installed: install one of them"
  fi
}

# fetch_archive FILE: FILE holds what was fetched so far.
fetch_archive() {
  local code=0
  [[ -s $1 ]] && has_sum "$1" && return 0
  say "fetching $CIFAR_ADDRESS"
  download "$CIFAR_ADDRESS" "$1" || code=$?
  # So end curl (22, 33, 36) and wget (8) when the server answers, but cannot go on half-way.
  if [[ -s $1 && $code =~ ^(8|22|33|36)$ ]]; then
    say "cannot go on from the partial file, starting again"
    rm -f "$1"
    code=0
    download "$CIFAR_ADDRESS" "$1" || code=$?
  fi
  [[ $code == 0 ]] || fail "the download stopped: run this script again to go on"
  as_published "$1" && return 0
  rm -f "$1"
  fail "$CIFAR_ADDRESS did not serve the published archive: run this script again"
}

get_cifar10() {
  local place=data/cifar10 archive=data/downloads/cifar-10-python.tar.gz.part
  if [[ -d $place/$CIFAR_FOLDER ]] && check cifar10 "$place"; then
    say "cifar10 is already complete in $place"
    return 0
  fi
  mkdir -p data/downloads "$place"
  fetch_archive "$archive"
  unpack "$archive" "$place.part" 1
  check cifar10 "$place.part" || fail "$archive does not hold the published batches"
  rm -rf "${place:?}/$CIFAR_FOLDER"
  mv "$place.part/$CIFAR_FOLDER" "$place/"
  rm -rf "$place.part" "$archive"
  say "cifar10 is ready in $place"
}

# ---- ImageNet ----------------------------------------------------------------------------------

TRAIN_TAR=ILSVRC2012_img_train.tar
VAL_TAR=ILSVRC2012_img_val.tar
DEVKIT=ILSVRC2012_devkit_t12.tar.gz

get_imagenet() {
  local place=data/imagenet/images file
  if [[ -z ${1:-} ]]; then
    say "ImageNet needs an account. From https://image-net.org/download-images.php, 'ILSVRC2012':"
    say "  $TRAIN_TAR  (138 GB, training images, tasks 1 and 2)"
    say "  $VAL_TAR  (6.3 GB, validation images, all tasks)"
    say "  $DEVKIT  (2.5 MB, development kit, tasks 1 and 2)"
    fail "put the three into one folder and run 'bash get_data.sh imagenet FOLDER'"
  fi
  for file in "$TRAIN_TAR" "$VAL_TAR" "$DEVKIT"; do
    [[ -s $1/$file ]] || fail "$1/$file is missing: run 'bash get_data.sh imagenet' to see the list"
  done
  mkdir -p "$place"
  if [[ -d $place/val ]]; then
    say "$place/val is already there"
  else
    as_published "$1/$DEVKIT" && as_published "$1/$VAL_TAR" || fail "download it again"
    unpack_val "$1" "$place/val.part"
    mv "$place/val.part/images" "$place/val"
    rm -rf "$place/val.part"
  fi
  if [[ -d $place/train ]]; then
    say "$place/train is already there"
  else
    say "checking $TRAIN_TAR, which takes some minutes"
    as_published "$1/$TRAIN_TAR" || fail "download it again"
    unpack_train "$1/$TRAIN_TAR" "$place/train.part"
    mv "$place/train.part" "$place/train"
  fi
  say "imagenet is ready in data/imagenet"
}

# unpack_train ARCHIVE FOLDER: the archive holds an archive of images per class.
unpack_train() {
  local inner
  say "unpacking $1"
  unpack "$1" "$2" 200
  for inner in "$2"/*.tar; do
    unpack "$inner" "${inner%.tar}" 2
    rm "$inner"
  done
}

# unpack_val ARCHIVES FOLDER: into FOLDER/images, a folder per class. The development kit has the
# class of each image, as a number, and a table of the numbers.
unpack_val() {
  say "unpacking $1/$VAL_TAR"
  unpack "$1/$DEVKIT" "$2" 1
  unpack "$1/$VAL_TAR" "$2/images" 10
  python3 - "$2/images" "$2/${DEVKIT%.tar.gz}/data" <<'PYTHON' || fail "cannot sort $2 by class"
import sys
from pathlib import Path

try:
    from scipy.io import loadmat
except ImportError:
    sys.exit("get_data.sh: reading the development kit needs scipy: pip install scipy")

images, kit = map(Path, sys.argv[1:])
synsets = loadmat(kit / "meta.mat", squeeze_me=True)["synsets"]
wnids = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in synsets}
truth = (kit / "ILSVRC2012_validation_ground_truth.txt").read_text().split()
files = sorted(images.glob("*.JPEG"))
if len(files) != len(truth):
    sys.exit(f"get_data.sh: {len(files)} validation images, but {len(truth)} classes are listed")
for file, number in zip(files, truth):
    folder = images / wnids[int(number)]
    folder.mkdir(exist_ok=True)
    file.rename(folder / file.name)
PYTHON
}

# ---- Cityscapes --------------------------------------------------------------------------------

IMAGE_ZIP=leftImg8bit_trainvaltest.zip
LABEL_ZIP=gtFine_trainvaltest.zip

get_cityscapes() {
  local place=data/cityscapes
  if [[ -d $place ]] && check cityscapes "$place"; then
    say "cityscapes is already complete in $place"
  elif [[ -z ${1:-} ]]; then
    say "Cityscapes needs an account. From https://www.cityscapes-dataset.com/downloads/:"
    say "  $IMAGE_ZIP  (11 GB)"
    say "  $LABEL_ZIP  (241 MB)"
    fail "put the two into one folder and run 'bash get_data.sh cityscapes FOLDER'"
  elif [[ -e $place ]]; then
    fail "$place is there but not complete: move it away and run this script again"
  else
    local archive
    for archive in "$IMAGE_ZIP" "$LABEL_ZIP"; do
      [[ -s $1/$archive ]] ||
        fail "$1/$archive is missing: run 'bash get_data.sh cityscapes' to see the list"
      as_published "$1/$archive" || fail "download it again"
    done
    say "unpacking $1/$IMAGE_ZIP and $LABEL_ZIP"
    unpack "$1/$IMAGE_ZIP" "$place.part" 20
    unpack "$1/$LABEL_ZIP" "$place.part/labels" 4
    mv "$place.part/labels/gtFine" "$place.part/gtFine" || fail "$1/$LABEL_ZIP holds no gtFine"
    rm -rf "$place.part/labels"
    check cityscapes "$place.part" || fail "$1 does not hold the published archives: see above"
    mv "$place.part" "$place"
    say "cityscapes is ready in $place"
  fi
  python3 tools/make_cityscapes_lists.py data ||
    fail "no list files: run 'python tools/make_cityscapes_lists.py' where mdeq_vision is installed"
}

main() {
  case "${1:-}" in
    cifar10)
      [[ $# -eq 1 ]] || fail "cifar10 takes no folder: run 'bash get_data.sh cifar10'"
      get_cifar10
      ;;
    imagenet | cityscapes)
      [[ $# -le 2 ]] || fail "give one folder: run 'bash get_data.sh $1 FOLDER'"
      local folder=${2:-}
      [[ -z $folder || $folder == /* ]] || folder=$CALLED_FROM/$folder
      [[ -z $folder || -d $folder ]] || fail "there is no folder $folder"
      "get_$1" "$folder"
      ;;
    check)
      [[ $# -eq 2 ]] || fail "say which data set to check: $NAMES"
      check "$2" "data/$2" || fail "$2 in data/$2 is not complete: run 'bash get_data.sh $2'"
      ;;
    "") fail "say which data set: $NAMES" ;;
    *) fail "unknown data set '$1': choose $NAMES" ;;
  esac
}

main "$@"
