"""Names of files are bytes: what is printed of them never ends a command."""

import io
import os
import sys

import numpy as np
import pytest
from PIL import Image

from sd_hyena.errors import BadInput
from sd_hyena.files.picture import read_metadata, write_image
from sd_hyena.files.picture_text import read_texts
from sd_hyena.options.command import run_parsed

ODD = os.fsdecode(b"gr\xf6\xdfe-\xc3\xa4.png")  # the first two in latin-1, the last in UTF-8


@pytest.mark.parametrize(
    "encoding, expected", [("utf-8", b"gr\xf6\xdfe-\xc3\xa4.png"), ("ascii", b"gr\xf6\xdfe-\\xe4.png")]
)
def test_a_name_that_is_no_text_is_printed_by_its_bytes_and_refused_in_one_line(monkeypatch, encoding, expected):
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding) for _ in range(2))
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)

    def main(name):
        print(f"{name} · 猫" if encoding == "utf-8" else name)
        raise BadInput(f"init_image={name} is no file")

    assert run_parsed(lambda: ODD, main, []) == 2
    printed = out.buffer.getvalue().splitlines()[0]
    assert printed.startswith(expected) and (encoding == "ascii" or printed.endswith(" · 猫".encode()))
    (line,) = err.buffer.getvalue().splitlines()
    assert line.startswith(b"error: init_image=gr\\udcf6\\udcdfe-") and line.endswith(b" is no file")


@pytest.mark.parametrize("suffix", [".png", ".webp", ".jpg"])
def test_a_picture_records_such_a_name(tmp_path, suffix):
    image = Image.fromarray(np.zeros((4, 4, 3), np.uint8))
    path = write_image(tmp_path / f"x{suffix}", image, f"a <lora:{ODD}:1>", {"config": {"lora": ODD}})
    assert read_metadata(path) == {"config": {"lora": ODD}}
    assert read_texts(path)["parameters"] == "a <lora:gr\\udcf6\\udcdfe-ä.png:1>"
