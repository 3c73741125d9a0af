"""Upscaler models: files as people have them are read or refused in one line, and their networks are what they were."""

import pickle
import struct
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save, save_file

from examples.tiny_sd.scenes import draw, numbered_scene
from sd_hyena.errors import BadInput
from sd_hyena.files.comparison import similarity
from sd_hyena.large.enlargement import enlarge
from sd_hyena.models.budget import Budget, OverBudget
from sd_hyena.models.upscaler import Upscaler, load_upscaler
from sd_hyena.options import given_path
from tests import upscalers
from tests.upscalers import compact, esrgan, in_new_names

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("spandrel")


def loaded(path, dtype: torch.dtype = torch.float32) -> Upscaler:
    return load_upscaler(path, CPU, dtype)


def picture(height: int = 9, width: int = 14, channels: int = 3) -> torch.Tensor:
    return torch.rand(1, channels, height, width, generator=torch.Generator().manual_seed(3))


def answer(upscaler: Upscaler, x: torch.Tensor) -> torch.Tensor:
    with upscaler.at_work() as larger:
        return larger(x)


FORMS = {  # a file as somebody has it, of an ESRGAN's weights
    "old.pth": lambda state: state,
    "real.pth": lambda state: {"params_ema": in_new_names(state)},
    "both.pth": lambda state: {"params": {name: 0 * value for name, value in state.items()}, "params_ema": state},
    "params.pth": lambda state: {"params": in_new_names(state)},
    "bsrgan.pth": lambda state: in_new_names(state, "RRDB_trunk"),
    "parallel.PTH": lambda state: {"state_dict": {f"module.{name}": value for name, value in state.items()}},
    "trainer.ckpt": lambda state: {"iter": 5, "model_state_dict": in_new_names(state)},
    "old.safetensors": lambda state: state,
    "new.safetensors": lambda state: in_new_names(state),
}


@pytest.mark.parametrize("name", FORMS)
def test_an_esrgan_is_read_by_its_old_and_new_names_wherever_its_weights_lie(name, tmp_path):
    net = esrgan()
    stored, path = FORMS[name](net.state_dict()), tmp_path / name
    save_file(stored, path) if name.endswith("safetensors") else torch.save(stored, path)
    given_path.upscaler(str(path))
    upscaler = loaded(path)
    x = picture()
    with torch.no_grad():
        expected = net(x).clamp(0, 1)
    assert upscaler.scale == 4 and upscaler.name == path.stem and torch.equal(answer(upscaler, x), expected)
    assert expected.std() > 0.05 and answer(upscaler, x).shape == (1, 3, 36, 56)


def test_a_file_of_torch_before_1_6_and_weights_in_half_and_in_float8_are_read(tmp_path):
    net, x = compact(), picture()
    for name, dtype, error in (
        ("a.pth", torch.float32, 0),
        ("b.pth", torch.float16, 2e-3),
        ("c.pth", torch.float8_e4m3fn, 0.3),
    ):
        state = {name: value.to(dtype) for name, value in net.state_dict().items()}
        torch.save(state, tmp_path / name, _use_new_zipfile_serialization=name == "c.pth")
        with torch.no_grad():
            assert (answer(loaded(tmp_path / name), x) - net(x).clamp(0, 1)).abs().max() <= error


def test_a_real_esrgan_that_unshuffles_and_a_compact_have_their_scale_and_multiple(tmp_path):
    for net, scale, multiple in ((esrgan(2, shuffle=2), 2, 4), (compact(3), 3, 1), (compact(2), 2, 1)):
        torch.save(net.state_dict(), tmp_path / "x.pth")
        upscaler = loaded(tmp_path / "x.pth")
        assert (upscaler.scale, upscaler.multiple) == (scale, multiple)
        x = picture(8, 12)
        with torch.no_grad():
            assert torch.equal(answer(upscaler, x), net(x).clamp(0, 1))


def bomb() -> object:
    class Bomb:
        def __reduce__(self):
            return Path.touch, (Path("bombed"),)

    return Bomb()


def torchscript(path: Path) -> None:
    class Planted(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    torch.jit.script(Planted()).save(str(path))


def zipped(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("esrgan.pth", bytes(1000))


def changed(state: dict, name: str, value: torch.Tensor) -> dict:
    assert name in state
    return state | {name: value}


def huge_header(path: Path) -> None:
    path.write_bytes(struct.pack("<Q", 1 << 60) + b"{" + bytes(100))


def wide(path: Path) -> None:
    """A hundred numbers that ask for a network of ten billion."""
    save_file(esrgan().state_dict() | {"model.0.weight": torch.zeros(100_000, 3, 1, 1)}, path)


FIRST = "body.0.weight"
WRONG = {  # file, what it is, and what is said of it
    "script.pt": (torchscript, "TorchScript"),
    "bomb.pth": (lambda path: torch.save({"params": {FIRST: bomb()}}, path), "was not executed"),
    "bare_bomb.pth": (lambda path: path.write_bytes(pickle.dumps(bomb())), "no file of torch.save"),
    "model.safetensors": (
        lambda path: save_file({"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(1)}, path),
        "looks like a Stable Diffusion model; give it as -m FILE",
    ),
    "model.ckpt": (
        lambda path: torch.save({"state_dict": {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(1)}}, path),
        "looks like a Stable Diffusion model; give it as -m FILE",
    ),
    "lora.safetensors": (lambda path: save_file({"lora_unet_x.lora_up.weight": torch.zeros(1)}, path), "looks like a LoRA"),
    "vae.safetensors": (lambda path: save_file({"decoder.conv_in.weight": torch.zeros(1)}, path), "looks like a VAE"),
    "stranger.pth": (lambda path: torch.save({"a": torch.ones(3)}, path), "is no upscaler model that is known here"),
    "denoiser.pth": (
        lambda path: torch.save(upscalers.network("DnCNN", "DnCNN", in_nc=3, out_nc=3, nc=8, nb=4).state_dict(), path),
        "cleans pictures and does not enlarge them (DnCNN)",
    ),
    "once.pth": (lambda path: torch.save(compact(1).state_dict(), path), "cleans pictures and does not enlarge them"),
    "grey.pth": (lambda path: torch.save(compact(2, channels=1).state_dict(), path), "takes 1 channels and gives 1"),
    "cut.pth": (
        lambda path: (torch.save(compact().state_dict(), path), path.write_bytes(path.read_bytes()[:-400])), "damaged|truncated"
    ),
    "cut.safetensors": (lambda path: path.write_bytes(save(compact().state_dict())[:-400]), "not a valid safetensors file"),
    "pointer.pth": (
        lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n"), "git lfs pull"
    ),
    "pointer.safetensors": (
        lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n"), "git lfs pull"
    ),
    "nan.pth": (
        lambda path: torch.save(changed(compact().state_dict(), FIRST, torch.full((8, 3, 3, 3), torch.nan)), path), "holds NaN"
    ),
    "huge.safetensors": (huge_header, "not a valid safetensors file"),
    "empty.pth": (lambda path: path.touch(), "no file of torch.save"),
    "empty.safetensors": (lambda path: path.touch(), "truncated or something else"),
    "nothing.pth": (lambda path: torch.save({}, path), "holds no weights"),
    "list.pth": (lambda path: torch.save([torch.ones(3)], path), "holds no weights"),
    "page.pth": (lambda path: path.write_text("<!DOCTYPE html><html>404"), "a web page"),
    "text.pth": (lambda path: path.write_text("see the README"), "a text of 14 bytes"),
    "zip.pth": (zipped, "is compressed"),
    "whole.pth": (
        lambda path: torch.save(changed(compact().state_dict(), FIRST, torch.ones(8, 3, 3, 3, dtype=torch.int64)), path),
        "body.0.weight is torch.int64",
    ),
    "complex.pth": (
        lambda path: torch.save(changed(compact().state_dict(), FIRST, torch.ones(8, 3, 3, 3).cfloat()), path), "complex64"
    ),
    "shapes.pth": (
        lambda path: torch.save(changed(compact().state_dict(), FIRST, torch.ones(9, 3, 3, 3)), path), "no network can be built"
    ),
    "lacks.pth": (
        lambda path: torch.save({k: v for k, v in compact().state_dict().items() if k != "body.2.bias"}, path),
        "no network can be built",
    ),
    "hollow.safetensors": (
        lambda path: save_file(compact().state_dict() | {"x": torch.zeros(10**9, 0)}, path), "larger than all that is stored"
    ),
    "claims.pth": (
        lambda path: torch.save(changed(compact().state_dict(), FIRST, torch.zeros(1).expand(10**6, 3, 3, 3)), path),
        "claims more numbers than are stored",
    ),
    "layers.pth": (
        lambda path: torch.save(compact().state_dict() | {"body.900000000.weight": torch.ones(1)}, path), "counts layers"
    ),
    "wide.safetensors": (wide, "larger than its file"),
    "net.onnx": (lambda path: path.write_bytes(b"\x08\x01"), "ONNX"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_hostile_or_wrong_file_is_refused_in_one_line_and_nothing_of_it_runs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write, said = WRONG[name]
    write(tmp_path / name)
    with pytest.raises(
        BadInput, match=rf"^upscaler='{name}': .*({said.replace('(', '.').replace(')', '.')})"
    ) as refused:
        loaded(name)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 500
    assert not (tmp_path / "bombed").exists()


def test_a_restorer_of_faces_and_a_network_that_answers_otherwise_are_refused(tmp_path, spandrel, monkeypatch):
    torch.save(compact().state_dict(), tmp_path / "x.pth")
    kind = spandrel.ImageModelDescriptor
    with monkeypatch.context() as patched:  # the real ones have ninety million weights
        patched.setattr(kind, "purpose", "FaceSR")
        with pytest.raises(BadInput, match="restores faces and does not enlarge pictures"):
            loaded(tmp_path / "x.pth")
    for answer_, said in ((lambda self, x: x, "by a tensor of"), (lambda self, x: x / 0, "by a tensor|NaN"),
                          (lambda self, x: 1 / 0, "does not compute .ZeroDivisionError")):  # fmt: skip
        with monkeypatch.context() as patched:
            patched.setattr(kind, "__call__", answer_)
            with pytest.raises(BadInput, match=said):
                loaded(tmp_path / "x.pth")


@pytest.mark.parametrize("name", ["model.safetensors", "lora.safetensors", "pointer.pth", "net.onnx", "missing.pth"])
def test_what_can_be_told_without_torch_is_told_before_it_is_loaded(name, tmp_path):
    if name in WRONG:
        WRONG[name][0](tmp_path / name)
    with pytest.raises(BadInput, match=r"^upscaler"):
        given_path.upscaler(str(tmp_path / name), "upscaler")


def test_where_spandrel_or_torchvision_is_missing_one_line_says_what_to_install(tmp_path, spandrel, monkeypatch):
    torch.save(compact().state_dict(), tmp_path / "x.pth")
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "spandrel", None)
        with pytest.raises(BadInput, match=r'not installed; run pip install "sd_hyena\[upscale\]"$'):
            loaded(tmp_path / "x.pth")
    for name in [name for name in sys.modules if name == "spandrel" or name.startswith("spandrel.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(BadInput, match=r"torchvision.*belongs to torch 2.*run pip install torchvision$") as refused:
        loaded(tmp_path / "x.pth")
    assert "\n" not in str(refused.value)


def test_a_path_never_reaches_spandrel(tmp_path, spandrel, monkeypatch):
    def refuse(*_):
        raise AssertionError("a path was given")

    for name in ("load_from_file", "load_state_dict_from_file"):
        monkeypatch.setattr(spandrel.ModelLoader, name, refuse)
    monkeypatch.setattr(torch.jit, "load", refuse)
    torch.save(compact().state_dict(), tmp_path / "x.pt")
    assert loaded(tmp_path / "x.pt").scale == 2


def test_half_precision_is_taken_where_the_network_is_known_to_work_in_it(tmp_path, spandrel, monkeypatch):
    net = compact()
    torch.save(net.state_dict(), tmp_path / "x.pth")
    half = loaded(tmp_path / "x.pth", torch.bfloat16)
    x = picture()
    with torch.no_grad():
        error = (answer(half, x) - net(x).clamp(0, 1)).abs().max()
    assert half.dtype == half.network.dtype == torch.bfloat16 and 1e-5 < error < 0.05
    assert answer(half, x).dtype == torch.float32
    original = spandrel.ImageModelDescriptor.__init__

    def without(self, *args, **kwargs):
        original(self, *args, **kwargs | {"supports_half": False, "supports_bfloat16": False})

    monkeypatch.setattr(spandrel.ImageModelDescriptor, "__init__", without)
    for dtype in (torch.bfloat16, torch.float16):
        assert loaded(tmp_path / "x.pth", dtype).dtype == torch.float32


def test_what_overflows_in_half_precision_is_computed_again_in_float32(tmp_path):
    net = compact()
    with torch.no_grad():
        for name, value in net.named_parameters():  # 10^6 within, and back
            value.mul_({"body.0.weight": 1e6, "body.4.weight": 1e-6}.get(name, 1))
            value.copy_(value.half().float().nan_to_num(posinf=6e4, neginf=-6e4))
    torch.save(net.state_dict(), tmp_path / "x.pth")
    upscaler, x = loaded(tmp_path / "x.pth", torch.float16), picture()
    with torch.no_grad():
        expected = net(x).clamp(0, 1)
        assert not net.half()(x.half()).isfinite().all()
    assert upscaler.dtype == torch.float16 and (answer(upscaler, x) - expected).abs().max() < 2e-3


def test_a_network_that_draws_noise_draws_the_same_and_leaves_everybody_elses_alone(tmp_path, spandrel, monkeypatch):
    torch.save(compact().state_dict(), tmp_path / "x.pth")
    state = torch.get_rng_state()
    upscaler = loaded(tmp_path / "x.pth")
    kind = spandrel.ImageModelDescriptor
    monkeypatch.setattr(kind, "__call__", lambda self, x: torch.rand(1, 3, *(2 * n for n in x.shape[2:])))
    assert torch.equal(answer(upscaler, picture()), answer(upscaler, picture()))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_network_waits_in_the_computers_memory_also_after_an_error(tmp_path, monkeypatch):
    torch.save(compact().state_dict(), tmp_path / "x.pth")
    upscaler, moves = loaded(tmp_path / "x.pth"), []
    monkeypatch.setattr(upscaler.network, "to", lambda *where: moves.append(where))
    with pytest.raises(KeyError), upscaler.at_work():
        raise KeyError
    assert moves == [(CPU, torch.float32), (CPU,)]


def test_a_budget_counts_what_is_made_and_refuses_before_it_is():
    with Budget(100):
        torch.zeros(50).add_(1).view(5, 10), torch.ones(50)
    for ask in (
        lambda: torch.empty(10, 11), lambda: torch.arange(101), lambda: torch.linspace(0, 1, 10**12), lambda: torch.eye(10**6),
        lambda: torch.zeros(50, 1).mul_(2) + torch.zeros(1, 50), lambda: [torch.zeros(30) for _ in range(4)],
        lambda: torch.nn.Linear(10**7, 10**7),
    ):  # fmt: skip
        with pytest.raises(OverBudget), Budget(100):
            ask()


def test_a_real_dat_beats_lanczos_on_a_scene(dat):
    truth = draw(numbered_scene(7, 3), 192)[48:144, 48:144]
    small = Image.fromarray(truth).resize((48, 48), Image.Resampling.BICUBIC)
    by_model, by_lanczos = (np.array(enlarge(small, (96, 96), one)) for one in (dat, None))
    assert dat.scale == 2 and small.getcolors(9) is None
    assert similarity(truth, by_model)[0] > similarity(truth, by_lanczos)[0] + 0.3
