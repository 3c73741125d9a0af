"""Tiled Diffusion's region files by the rules of its loader, with a line for what it does in silence."""

import json

import pytest

from sd_hyena.large.regions import Region, read_regions

BOX = {"enable": True, "x": 0.1, "y": 0.2, "w": 0.5, "h": 0.25, "prompt": "a", "neg_prompt": "b", "blend_mode": "Background",
       "feather_ratio": 0.2, "seed": -1}  # fmt: skip


def read(folder, *controls) -> tuple[Region, ...]:
    (folder / "r.json").write_text(json.dumps({"bbox_controls": list(controls)}))
    return read_regions(folder / "r.json")


@pytest.mark.parametrize(
    "change, expected",
    [
        ({"x": 0.7, "w": 0.5}, (0.7, 0.2, 0.3, 0.25)),
        ({"y": 0.9, "h": 1}, (0.1, 0.9, 0.5, 0.1)),
        ({"x": -0.2}, (0, 0.2, 0.5, 0.25)),  # moved inside, as wide as it was
        ({"x": -0.2, "w": 3}, (0, 0.2, 1, 0.25)),
    ],
)
def test_a_rectangle_over_the_border_is_clipped_and_that_is_said(tmp_path, capsys, change, expected):
    (region,) = read(tmp_path, BOX | change)
    assert (region.x, region.y, region.w, region.h) == pytest.approx(expected)
    (line,) = capsys.readouterr().out.splitlines()
    assert "region 1 reaches over the border, clipped to" in line


def test_a_number_that_was_rounded_is_no_reach_over_the_border(tmp_path, capsys):
    read(tmp_path, BOX | {"x": 0.3333, "w": 0.6668})
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("change", [{"w": 0}, {"h": -0.5}, {"x": 1}, {"x": 1.4}, {"y": 2.0}, {"w": 0.0, "h": 0.0}])
def test_what_covers_nothing_is_passed_over_and_the_others_are_read(tmp_path, capsys, change):
    (region,) = read(tmp_path, BOX | change, BOX | {"prompt": "c"})
    assert region.prompt == "c"
    assert "region 1 with" in (line := capsys.readouterr().out) and "covers nothing, passed over" in line


def test_a_disabled_region_may_be_anything_and_is_not_spoken_of(tmp_path, capsys):
    assert [r.enable for r in read(tmp_path, BOX | {"enable": False}, BOX | {"enable": False, "w": 0}, BOX)] == [
        False,
        True,
    ]
    read(tmp_path, {"enable": False})
    assert capsys.readouterr().out == ""


def test_what_is_missing_has_the_loader_s_defaults_and_that_is_said(tmp_path, capsys):
    (region,) = read(tmp_path, {"prompt": "a", "x": None})
    assert (region.x, region.y, region.w, region.h) == (0.4, 0.4, 0.2, 0.2)
    assert (region.negative_prompt, region.blend_mode, region.feather_ratio, region.seed) == (
        "",
        "background",
        0.2,
        None,
    )
    assert capsys.readouterr().out.count("is missing") == 4
    (region,) = read(tmp_path, BOX | dict.fromkeys(("prompt", "neg_prompt", "blend_mode", "feather_ratio", "seed")))
    assert (region.prompt, region.blend_mode, region.seed) == ("", "background", None)


@pytest.mark.parametrize("seed, read_as", [(-1, None), (-1.0, None), (77.0, 77), (2**32 + 5, 2**32 + 5)])
def test_seeds_come_as_its_number_field_writes_them(tmp_path, seed, read_as):
    assert read(tmp_path, BOX | {"seed": seed})[0].seed == read_as


def test_a_feather_beyond_its_range_is_limited_and_a_key_of_a_fork_is_named(tmp_path, capsys):
    regions = read(tmp_path, BOX | {"feather_ratio": 1.5, "key_prompt": "x"}, BOX | {"feather_ratio": -1, "enable": 1})
    assert [region.feather_ratio for region in regions] == [1.0, 0.0] and regions[1].enable is True
    assert "region 1: what 'key_prompt' means is not known, passed over" in capsys.readouterr().out


@pytest.mark.parametrize("mode", ["Foreground", "FOREGROUND", "foreground"])
def test_blend_modes_are_its_own_blind_to_case(tmp_path, mode):
    assert read(tmp_path, BOX | {"blend_mode": mode})[0].blend_mode == "foreground"
