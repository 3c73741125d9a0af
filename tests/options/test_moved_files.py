"""Files that a picture of ours names by paths of another machine are found by name or hash."""

import hashlib
import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from sd_hyena.errors import BadInput
from sd_hyena.files import hashes
from sd_hyena.files.hashes import file_sha256, lora_sha256
from sd_hyena.files.picture import write_image
from sd_hyena.models.location import model_sha256
from sd_hyena.options.command_line import parse, to_dict
from sd_hyena.options.generate_config import GenerateConfig
from sd_hyena.options.infotext import UsedLora, parameters
from sd_hyena.options.named_files import find
from sd_hyena.options.shipped import SHIPPED_MODEL
from sd_hyena.options.shown_hashes import shown_hashes
from sd_hyena.processes import progress

MODEL = {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(2)}


@pytest.fixture
def library(tmp_path):
    """A model, another one, a VAE's folder, a LoRA, an embedding: all in folders of one's own."""
    folder = tmp_path / "library"
    for name in ("models/below", "vaes", "loras", "words"):
        (folder / name).mkdir(parents=True)
    save_file(MODEL, folder / "models" / "below" / "sd15.safetensors")
    save_file(MODEL | {"x": torch.ones(1)}, folder / "models" / "other.safetensors")
    (folder / "models" / "folder").symlink_to(SHIPPED_MODEL)
    (folder / "models" / "circle").symlink_to(folder / "models")
    (folder / "models" / "nowhere.safetensors").symlink_to(folder / "gone")
    (folder / "vaes" / "sharp").mkdir()
    (folder / "vaes" / "sharp" / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL"}))
    save_file({"lora_unet_x.lora_up.weight": torch.ones(1)}, folder / "loras" / "fur.safetensors")
    save_file({"emb_params": torch.ones(1, 96)}, folder / "words" / "easy.safetensors")
    return folder


def dirs(library) -> list[str]:
    places = {"model_dir": "models", "vae_dir": "vaes", "lora_dir": "loras", "embedding_dir": "words"}
    return [part for name, place in places.items() for part in (f"--{name}", str(library / place))]


def picture(folder, model_hash: str = "", lora_hash: str = "", **options) -> str:
    """As it is written elsewhere."""
    one = to_dict(GenerateConfig(prompt="a fox", seed=1, width=64, height=64, steps=2, cfg_scale=3.0))
    one |= {"height": 64} | options
    used = [UsedLora(Path("/there/fur.safetensors"), 0.5, lora_hash)] if lora_hash else []
    text = parameters(one, Path(one["model"]).name, model_hash, "", used, "")
    return str(
        write_image(folder / "x.png", Image.new("RGB", (64, 64)), text, {"config": one, "model_sha256": model_hash})
    )


def test_all_that_a_picture_names_is_found_by_name_in_the_folders_that_are_given(library, tmp_path):
    elsewhere = dict(
        model="/there/sd15.safetensors", vae="/there/sharp", lora="/there/fur.safetensors:0.5",
        embeddings="/there/easy.safetensors,/there/all_of_them",
    )  # fmt: skip
    config = parse(GenerateConfig, ["--from", picture(tmp_path, **elsewhere), *dirs(library)])
    assert config.model == str(library / "models" / "below" / "sd15.safetensors")
    assert config.vae == str(library / "vaes" / "sharp")
    assert config.lora == f"{library / 'loras' / 'fur.safetensors'}:0.5"
    assert config.embeddings == f"{library / 'words' / 'easy.safetensors'},{library / 'words'}"
    assert (config.prompt, config.steps, config.seed) == ("a fox", 2, 1)


def test_what_was_renamed_is_found_by_the_hash_that_the_picture_has(library, tmp_path):
    model, lora = library / "models" / "below" / "sd15.safetensors", library / "loras" / "fur.safetensors"
    noted = dict(model_hash=hashlib.sha256(model.read_bytes()).hexdigest(), lora_hash=lora_sha256(lora))
    renamed = lora.rename(lora.with_name("wool.safetensors"))
    path = picture(tmp_path, **noted, model="C:\\there\\mine.ckpt", lora="/there/fur.safetensors:0.5")
    config = parse(GenerateConfig, ["--from", path, *dirs(library)])
    assert (config.model, config.lora) == (str(model), f"{renamed}:0.5")


def test_a_diffusers_folder_is_found_by_name_and_by_the_hash_of_its_unet_and_never_a_part_of_it(library, tmp_path):
    there = library / "models" / "folder"
    assert find("model", "/x/folder", "", str(library / "models")) == there
    path = picture(tmp_path, model_hash=model_sha256(SHIPPED_MODEL), model="/there/tiny")
    assert parse(GenerateConfig, ["--from", path, *dirs(library)]).model == str(there)
    assert find("model", "diffusion_pytorch_model", "", str(library / "models")) is None
    assert find("model", "none", "f" * 64, str(library / "models")) is None


def test_what_is_there_or_answered_by_a_flag_is_not_looked_for(library, tmp_path):
    other = str(library / "models" / "other.safetensors")
    gone = picture(tmp_path, model="/there/sd15.safetensors")
    assert parse(GenerateConfig, ["--from", gone, "-m", other, *dirs(library)]).model == other
    here = picture(tmp_path, model=other)
    assert parse(GenerateConfig, ["--from", here, *dirs(library)]).model == other


@pytest.mark.parametrize("option", ["model", "vae", "lora", "embeddings"])
def test_what_is_nowhere_is_answered_in_a_line_that_names_the_folder_s_option(library, tmp_path, option):
    path = picture(tmp_path, model_hash="ab" * 32, **{option: "/there/gone.safetensors"})
    folder = {"model": "model_dir", "vae": "vae_dir", "lora": "lora_dir", "embeddings": "embedding_dir"}[option]
    with pytest.raises(BadInput, match=rf"its \w+ '/there/gone.safetensors'.* is not there, nor is --{folder} given"):
        parse(GenerateConfig, ["--from", path])
    with pytest.raises(BadInput, match=rf"is not there, nor in {library}.*; --?\w+ names another"):
        parse(GenerateConfig, ["--from", path, *dirs(library)])


def test_a_file_is_read_for_its_hash_once_and_again_when_it_changes(tmp_path, monkeypatch):
    path, opened = tmp_path / "x", []
    path.write_bytes(b"a" * 10)
    counted = SimpleNamespace(sha256=lambda: opened.append(1) or hashlib.sha256())
    monkeypatch.setattr(hashes, "hashlib", counted)
    for content in (b"a" * 10, b"b" * 10):
        path.write_bytes(content)
        os.utime(path, ns=(0, content[0]))
        for _ in range(2):
            assert file_sha256(path) == hashlib.sha256(content).hexdigest()
    assert len(opened) == 2


def test_many_files_that_take_long_to_read_are_not_read_in_silence(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(progress, "SELDOM", 0.02)
    for name in "ab":
        (tmp_path / name).write_bytes(bytes(20_000_000))
    slow = lambda path, read: [read(10_000_000), progress.time.sleep(0.05), read(10_000_000), "f"][-1]
    files = [tmp_path / "a", tmp_path / "b"]
    assert list(shown_hashes(files, "looking for 'x' by its hash", slow)) == ["f", "f"]
    said = capsys.readouterr().err
    assert "looking for 'x' by its hash, GB: 0.01/0.04" in said and "GB: 0.03/0.04" in said
