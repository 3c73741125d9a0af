import os
import re
import shutil

import pytest
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file

from sd_hyena import doctor
from sd_hyena.doctor import DoctorConfig, Unwell
from sd_hyena.models import location
from sd_hyena.models.location import model_path, model_sha256
from sd_hyena.models.single_file import LAYOUTS
from sd_hyena.options.shipped import SHIPPED_MODEL
from tests import ldm
from tests.faults.conftest import ended


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(doctor, "SIZES", ())


def test_a_healthy_machine_is_described_and_found_in_order(tmp_path, capsys, monkeypatch):
    """Students are expected to save more the larger the image."""
    looked = []
    monkeypatch.setattr(doctor, "SIZES", (64, 512))
    monkeypatch.setattr(location, "model_path", lambda given: looked.append(given) or model_path(given))
    doctor._looked_at.cache_clear()
    doctor.main(DoctorConfig(out_dir=str(tmp_path / "out"), device="cpu"))
    said = capsys.readouterr().out
    assert model_sha256(SHIPPED_MODEL)[:10] in said and "level0, 32 channels: IN01 IN02 OUT09 OUT10 OUT11" in said
    assert "512 px" in said and said.endswith("all in order\n")
    assert "StableDiffusionPipeline that reads text of width 96, hash" in said
    (free,) = re.findall(r"device +([\d.]+) GiB of the computer's memory are free", said)
    assert 0 < float(free) < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    assert looked == [""]  # a large model is looked at once
    lines = [line for line in said.splitlines() if "times cheaper" in line]
    small, large = (float(line.split("(")[1].split()[0]) for line in lines)
    assert small < 1.1 < large


@pytest.mark.parametrize(
    "layout, kind", [("sd15", "Stable Diffusion 1.x"), ("sd21", "Stable Diffusion 2.x"), ("sdxl", "SDXL")]
)
def test_a_model_s_kind_is_told_and_whether_it_paints_in_masks(monkeypatch, layout, kind):
    monkeypatch.setattr(location, "model_path", lambda _: LAYOUTS / layout)
    doctor._looked_at.cache_clear()
    assert doctor._looked_at("")[1] == kind
    load = UNet2DConditionModel.load_config
    monkeypatch.setattr(UNet2DConditionModel, "load_config", lambda *given: {**load(*given), "in_channels": 9})
    doctor._looked_at.cache_clear()
    assert doctor._looked_at("")[1] == f"{kind}, inpainting"
    doctor._looked_at.cache_clear()


def test_what_fails_is_named_and_the_rest_still_looked_at(tmp_path, capsys, monkeypatch):
    shutil.copytree(SHIPPED_MODEL, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(doctor, "PACKAGES", ("torch", "no-such-package"))
    with pytest.raises(Unwell, match="installed, disk, model"):
        doctor.main(DoctorConfig(model=str(tmp_path / "model"), out_dir=str(tmp_path / "file"), device="cpu"))
    said = capsys.readouterr().out
    assert "no-such-package" in said and "pip install" in said and "no weights" in said
    assert "cpu, 1 threads" in said and "all in order" not in said


def test_a_full_disk_is_said_before_a_run_starts(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 2**29))
    with pytest.raises(Unwell, match="disk"):
        doctor.main(DoctorConfig(out_dir=str(tmp_path), device="cpu"))
    assert "0.5 GiB free" in capsys.readouterr().out


def test_the_command_ends_with_1_if_something_is_not_in_order(tmp_path):
    done = ended(tmp_path, DoctorConfig, "-m", tmp_path / "nowhere")
    assert done.code == 1 and "FAILS" in done.out and "not in order: model" in done.last_line


def test_a_single_file_is_described_as_its_folder_is(tmp_path, own_pipe, capsys):
    file = tmp_path / "tiny.safetensors"
    save_file(ldm.single_file(own_pipe, "sd15"), file)
    shutil.copytree(SHIPPED_MODEL, file.with_suffix(""), ignore=shutil.ignore_patterns("*.safetensors"))
    doctor.main(DoctorConfig(model=str(file), out_dir=str(tmp_path / "out"), device="cpu"))
    assert "level0, 32 channels: IN01 IN02 OUT09 OUT10 OUT11" in capsys.readouterr().out
