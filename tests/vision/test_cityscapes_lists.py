"""List files: what the writer writes, the reader reads, whatever the names."""

import pytest
from PIL import Image

from lib.errors import InputError
from mdeq_vision.datasets.cityscapes import WAY_OUT, check_names, read_list
from mdeq_vision.datasets.cityscapes_lists import write_lists

CITIES = ["aachen", "new york", "a  b", "München", 'tom\'s "town"', "line\u2028end", "next\x85line"]


def picture(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (4, 4)).save(path)
    return path


@pytest.fixture
def made(tmp_path):
    """``made(city, ...)``: the root of a tree with a scene of each city in every split."""

    def make(*cities):
        for split in ("train", "val", "test"):
            for city in cities:
                scene = f"{split}/{city}/{city}_000000_000019"
                picture(tmp_path / f"cityscapes/leftImg8bit/{scene}_leftImg8bit.png")
                if split != "test":
                    picture(tmp_path / f"cityscapes/gtFine/{scene}_gtFine_labelIds.png")
        return tmp_path

    return make


def test_names_come_back(made):
    root = made(*CITIES)
    for path, count in write_lists(root).items():
        samples = read_list(path, root / "cityscapes", WAY_OUT, check_names)
        assert len(samples) == count
        assert {image.parent.name for image, _ in samples} == set(CITIES)
        for image, labels in samples:
            assert (labels is None) == (path.stem == "test")
            assert labels is None or labels.parent.name == image.parent.name


@pytest.mark.parametrize("city", ["a\tb", "a\nb", "a\rb", "caf\udce9"])
def test_names_that_cannot_stand_in_a_list_are_refused(made, city):
    root = made("aachen", city)
    with pytest.raises(InputError, match="cannot stand in a list") as caught:
        write_lists(root)
    assert len(str(caught.value).splitlines()) == 1
    assert not (root / "list").exists()


@pytest.mark.parametrize("change", ["blanks", "mark", "windows", "padded"])
def test_lists_as_others_write_them(made, change):
    root = made("aachen", "bochum")
    path = next(iter(write_lists(root)))
    text, expected = path.read_text(), read_list(path, root / "cityscapes", WAY_OUT, check_names)
    changed = {
        "blanks": text.replace("\t", "   "),
        "mark": "\ufeff" + text,  # the byte order mark of some editors
        "windows": text.replace("\n", "\r\n"),
        "padded": text.replace("\t", " \t ").replace("\n", "\t \n\n"),
    }
    path.write_text(changed[change], encoding="utf-8", newline="")
    assert read_list(path, root / "cityscapes", WAY_OUT, check_names) == expected
