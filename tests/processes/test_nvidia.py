"""A driver that knows a GPU which torch does not: what is said, and that it is said once."""

import sys

import pytest
import torch

from sd_hyena.processes import nvidia
from sd_hyena.processes.device import pick_device

KNOWN = "Model: \t\t NVIDIA GeForce RTX 3090\nIRQ:   \t\t 88\n"


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine whose driver is what the test makes of it; torch is for the CPU."""
    monkeypatch.setattr(nvidia, "DRIVER", tmp_path / "gpus")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    for told in (nvidia.unused_gpu, nvidia.say_unused_gpu):
        told.cache_clear()
    yield tmp_path
    for told in (nvidia.unused_gpu, nvidia.say_unused_gpu):
        told.cache_clear()


def driver(machine):
    (machine / "gpus" / "0000:01:00.0").mkdir(parents=True)
    (machine / "gpus" / "0000:01:00.0" / "information").write_text(KNOWN)


def smi(machine, body: str):
    """nvidia-smi on the PATH, as Windows has it."""
    (machine / "bin").mkdir()
    (machine / "bin" / "nvidia-smi").write_text(f"#!{sys.executable}\nimport sys\n{body}\n")
    (machine / "bin" / "nvidia-smi").chmod(0o755)


def test_a_gpu_of_the_driver_is_said_once_with_the_one_line_that_helps(machine, capsys):
    driver(machine)
    assert pick_device("auto") == pick_device("auto") == torch.device("cpu")
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and said.startswith("note: NVIDIA GeForce RTX 3090 is here, but torch ")
    assert nvidia.CUDA_TORCH in said


def test_the_gpu_is_asked_of_nvidia_smi_where_there_is_no_proc(machine, capsys):
    smi(machine, "assert sys.argv[1:] == ['-L']; print('GPU 0: NVIDIA RTX A4000 (UUID: GPU-8f3a)')")
    pick_device("auto")
    assert capsys.readouterr().out.startswith("note: NVIDIA RTX A4000 is here")


@pytest.mark.parametrize("body", ["sys.exit(9)", "print('No devices were found')", "sys.stdout.buffer.write(b'\\xff')"])
def test_an_nvidia_smi_without_a_gpu_is_no_gpu(machine, body):
    smi(machine, body)
    assert nvidia.gpus() == [] and nvidia.unused_gpu() == ""


def test_a_machine_without_one_a_hidden_one_and_a_device_asked_for_are_passed_over(machine, capsys, monkeypatch):
    pick_device("auto")
    driver(machine)
    nvidia.unused_gpu.cache_clear(), nvidia.say_unused_gpu.cache_clear()
    pick_device("cpu")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    pick_device("auto")
    assert not capsys.readouterr().out


def test_a_torch_for_cuda_that_cannot_reach_the_gpu_is_not_to_be_replaced(machine, monkeypatch):
    driver(machine)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "CUDA 13.0 cannot use it" in nvidia.unused_gpu() and "pip" not in nvidia.unused_gpu()
