"""How a file of weights is packed, told without torch: by its name, and by first bytes that are no weights at all."""

from __future__ import annotations

from pathlib import Path

from sd_hyena.errors import BadInput

SAFETENSORS = (".safetensors", ".sft")
PICKLED = (".pt", ".pth", ".ckpt", ".bin", ".pkl")  # what torch.save wrote
OTHERS = {
    ".gguf": "GGUF, quantised in blocks",
    ".onnx": "ONNX, a compiled network",
    ".engine": "TensorRT, a compiled network",
    ".trt": "TensorRT, a compiled network",
    ".msgpack": "Flax's",
    ".h5": "TensorFlow's",
}
LOOKED_AT = 512  # bytes
LONGEST_TEXT = 1 << 16  # bytes of a page that stands in for weights


def is_safetensors(path: str | Path) -> bool:
    """By its suffix, in whatever case."""
    return Path(path).suffix.lower() in SAFETENSORS


def is_pickled(path: str | Path) -> bool:
    """By its suffix, in whatever case."""
    return Path(path).suffix.lower() in PICKLED


def check_packed(path: str | Path, forms: str = "a .safetensors or .ckpt file") -> None:
    """Raise BadInput for a file of another format, and for what a download left where weights should be."""
    path = Path(path)
    if not is_safetensors(path) and not is_pickled(path):
        other = OTHERS.get(path.suffix.lower())
        raise BadInput(f"{str(path)!r}" + (f" is {other}" if other else "") + f": expected {forms}")
    with path.open("rb") as file:
        start = file.read(LOOKED_AT)
    if stands_in := _stand_in(start, path.stat().st_size):
        what = "not a valid safetensors file: " if is_safetensors(path) else ""
        raise BadInput(f"{what}{str(path)!r} is {stands_in}")


def _stand_in(start: bytes, size: int) -> str:
    """What a file with this start is if it is no weights, and what to do; empty if it may be weights."""
    if start.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the weights; fetch them: git lfs pull"
    if b"annex/objects/" in start:
        return "a git-annex pointer, not the weights; fetch them: git annex get"
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n")
    if text[:14].lower().startswith((b"<!doctype html", b"<html", b"<?xml")):
        return "a web page, not the weights (of a site that asked to log in?); fetch it again"
    if text and size <= LONGEST_TEXT and _is_text(start):
        return f"a text of {size} bytes, not weights ({text.decode().splitlines()[0][:60]!r}); fetch it again"
    return ""


def _is_text(start: bytes) -> bool:
    return all(32 <= byte < 127 or byte in b"\t\r\n" for byte in start)
