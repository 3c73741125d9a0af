import json
import os
import struct
import zipfile

import pytest
import torch
from safetensors.torch import save_file

from sd_hyena.errors import BadInput
from sd_hyena.files.weights import read_weights, write_weights


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_what_is_written_is_read_again(tmp_path, suffix):
    shared = torch.randn(3, 4)
    tensors = {"a": shared, "b": shared.T, "half": torch.ones(2, dtype=torch.bfloat16)}
    write_weights(tmp_path / f"x{suffix}", tensors, {"key": "värde\n"})
    read, metadata = read_weights(tmp_path / f"x{suffix}")
    assert metadata == {"key": "värde\n"} and read.keys() == tensors.keys()
    for name, value in tensors.items():
        assert torch.equal(read[name], value) and read[name].dtype == value.dtype


def raw(header: bytes, body: bytes = b"", length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + body


ONE = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
HOSTILE = {
    "empty": b"",
    "three bytes": b"abc",
    "truncated": raw(json.dumps({"x": ONE}).encode(), b"\0\0\0"),
    "over-long": raw(json.dumps({"x": ONE}).encode(), b"\0" * 9),
    "no JSON": raw(b"{nonsense}"),
    "huge header": raw(b"{}", length=2**62),
    "negative offsets": raw(json.dumps({"x": {**ONE, "data_offsets": [-4, 0]}}).encode(), b"\0" * 4),
    "overlap": raw(json.dumps({"x": ONE, "y": ONE}).encode(), b"\0" * 4),
    "hole": raw(json.dumps({"x": ONE, "y": {**ONE, "data_offsets": [8, 12]}}).encode(), b"\0" * 12),
    "shape overflow": raw(json.dumps({"x": {**ONE, "shape": [2**40, 2**40]}}).encode(), b"\0" * 4),
    "duplicate key": raw(b'{"x":%s,"x":%s}' % ((json.dumps(ONE).encode(),) * 2), b"\0" * 4),
    "deep JSON": raw(b"[" * 100_000),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_malformed_safetensors_file_is_refused_in_one_line_that_names_it(tmp_path, name):
    path = tmp_path / "x.safetensors"
    path.write_bytes(HOSTILE[name])
    with pytest.raises(BadInput, match=r"not a valid safetensors file: .*x\.safetensors") as error:
        read_weights(path)
    assert "\n" not in str(error.value)


def test_a_pickle_named_safetensors_and_the_reverse_are_told_apart(tmp_path):
    torch.save({"tensors": {}}, tmp_path / "zip.safetensors")
    torch.save({"tensors": {}}, tmp_path / "bare.safetensors", _use_new_zipfile_serialization=False)
    for name in ("zip", "bare"):
        with pytest.raises(BadInput, match="looks like a PyTorch pickle"):
            read_weights(tmp_path / f"{name}.safetensors")
    save_file({"x": torch.ones(2)}, tmp_path / "y.safetensors")
    (tmp_path / "y.safetensors").rename(tmp_path / "y.pt")
    with pytest.raises(BadInput, match="looks like a safetensors file"):
        read_weights(tmp_path / "y.pt")


class Payload:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


@pytest.mark.parametrize("suffix", [".pt", ".ckpt"])
def test_a_payload_is_refused_and_not_executed_even_when_the_environment_asks_for_it(tmp_path, monkeypatch, suffix):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    torch.save({"tensors": {"x": Payload(tmp_path / "executed")}}, tmp_path / f"x{suffix}")
    with pytest.raises(BadInput, match="not executed"):
        read_weights(tmp_path / f"x{suffix}")
    assert not (tmp_path / "executed").exists()


def test_a_zip_bomb_is_refused_before_it_is_inflated(tmp_path, monkeypatch):
    torch.save({"tensors": {"x": torch.zeros(10**6)}}, tmp_path / "x.pt")
    with (
        zipfile.ZipFile(tmp_path / "x.pt") as source,
        zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for name in source.namelist():
            bomb.writestr(name, source.read(name))
    assert (tmp_path / "bomb.pt").stat().st_size < 10**5
    monkeypatch.setattr(torch, "load", lambda *a, **k: pytest.fail("it was opened"))
    with pytest.raises(BadInput, match="unpack to"):
        read_weights(tmp_path / "bomb.pt")


@pytest.mark.parametrize("content", [[1, 2], {"tensors": [1]}, {"tensors": {"x": 1}}, {"state_dict": {}}, "text"])
def test_a_pt_of_somebody_else_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(BadInput, match=r"no \.pt of train\.py"):
        read_weights(tmp_path / "x.pt")


def test_other_files_and_folders_are_refused(tmp_path):
    (tmp_path / "x.txt").write_text("hello")
    for path in (tmp_path, tmp_path / "x.txt", tmp_path / "missing.pt"):
        with pytest.raises(BadInput):
            read_weights(path)
