import os
from contextlib import nullcontext

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sd_hyena.errors import BadInput
from sd_hyena.files.names import check_format, free_path, own_folder, writable_folder


@pytest.mark.parametrize("good", ["Hyena-{s:05d}", "x", "{s}", "a/b-{s:3d}", "{{s}}", "ü {s}"])
def test_good_formats_pass(good):
    assert check_format(good, "s") == good


BAD = [
    "../../x", "/etc/x", "{s.__class__}", "{x}", "{s", "{s:99999999999d}", "", "a\0b", "x" * 300, "CON", "a:b", "{s!r}",
    "{}", "{s[0]}", "{s:{s}}", "a/../b", "a//b", "..\\x", "{s:>9}", "nul.{s}", "a\nb", "{s:d0}", "x?", '"',
]  # fmt: skip


@pytest.mark.parametrize("bad", BAD)
def test_bad_formats_are_refused_in_one_line(bad):
    with pytest.raises(BadInput) as error:
        check_format(bad, "s")
    assert "\n" not in str(error.value)


@given(st.text(max_size=40))
def test_any_format_either_is_refused_or_stays_a_short_name_inside_its_folder(text):
    try:
        check_format(text, "nh")
    except BadInput:
        return
    name = text.format(n=3, h=1)
    inside = os.path.abspath(os.path.join("/folder", name))
    assert inside.startswith("/folder/") and len(name) <= 200 and "\0" not in name


def test_a_taken_name_gets_a_number(tmp_path):
    assert free_path(tmp_path, "a", ".png") == tmp_path / "a.png"
    for name in ("a.png", "a-1.png"):
        (tmp_path / name).touch()
    assert free_path(tmp_path, "a", ".png") == tmp_path / "a-2.png"


def test_a_folder_is_made_and_left_empty(tmp_path):
    assert list(writable_folder(tmp_path / "a" / "b").iterdir()) == []


def test_a_folder_of_one_s_own_that_stays_empty_is_taken_away_with_those_made_for_it_and_no_other(tmp_path):
    (tmp_path / "there").mkdir()
    for ending in (nullcontext(), pytest.raises(KeyError)):
        with ending as error, own_folder(tmp_path / "there" / "a" / "b") as folder:
            assert folder.is_dir()
            if error:
                raise KeyError
    with own_folder(tmp_path / "there"):
        pass
    assert list(tmp_path.rglob("*")) == [tmp_path / "there"]
    with own_folder(tmp_path / "there" / "a" / "b") as folder:
        (tmp_path / "there" / "a" / "x").touch()
    assert not folder.exists() and (tmp_path / "there" / "a" / "x").exists()


def test_what_cannot_be_a_folder_is_refused(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for path in (tmp_path / "file", tmp_path / "file" / "x", tmp_path / "loop", "/proc/x", "a\0b"):
        with pytest.raises(BadInput, match="out_dir"):
            writable_folder(path)
