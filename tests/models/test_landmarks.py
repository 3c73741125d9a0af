"""Landmarks do on every layout what a file of students can do: whole pictures, tiles, sites that keep their attention."""

import numpy as np
import pytest

from sd_hyena.evaluate.config import EvaluationConfig
from sd_hyena.evaluate.evaluation import evaluate
from sd_hyena.generate.engine import Engine
from sd_hyena.options.generate_config import GenerateConfig
from tests.gate import gated

TILES = dict(tiled_diffusion="multidiffusion", tile_width=8, tile_height=8)  # of 64 tokens at level 0


@pytest.mark.parametrize("layout", [*gated(["sd15"]), "sd21", "sdxl"])
def test_landmarks_draw_whole_and_in_tiles_and_sites_keep_their_attention(layout, folders, tmp_path):
    engine, given = Engine(), dict(model=str(folders[layout]), device="cpu", prompt="a red circle", num_images=1)
    given |= dict(width=96, height=64, steps=2, seed=3, cfg_scale=9.0, grow="off", out_dir=str(tmp_path))

    def drawn(hyena: str, **further) -> np.ndarray:
        (picture,) = engine.draw(GenerateConfig(**given, **further, hyena=hyena))
        return np.asarray(picture.image).astype(int)

    attention, tiles = drawn(""), drawn("", **TILES)
    few = drawn("landmarks:4:all")
    assert 0 < np.abs(few - attention).mean() < 40
    assert np.array_equal(drawn("landmarks:4:all", keep_attention="all"), attention)
    assert not np.array_equal(drawn("landmarks:4:all", **TILES), tiles)
    assert np.abs(drawn("landmarks:64:all", **TILES) - tiles).max() <= 2  # as many as a tile has tokens
    assert not np.array_equal(tiles, attention)


@pytest.mark.gate
def test_landmarks_are_evaluated_on_another_layout_and_more_of_them_are_nearer(folders, tmp_path):
    given = dict(model=str(folders["sd21"]), sizes="64", guidance="5", images=1, states=1, steps=1, device="cpu")
    report = evaluate(EvaluationConfig(students="landmarks:4:all,landmarks:64:all", out_dir=str(tmp_path), **given))
    few, all_ = (report["students"][f"landmarks:{n}:all"]["sizes"]["64x64"] for n in (4, 64))
    assert all_["prediction"]["guided_5"] < 1e-8 < few["prediction"]["guided_5"] < 1
    assert len(few["sites"]) == len(all_["sites"]) > 2 and all_["images"]["5"]["psnr_min"] > 50
