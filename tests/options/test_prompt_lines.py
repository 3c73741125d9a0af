"""`-p @FILE`: a config a line."""

import pytest

from sd_hyena.errors import BadInput
from sd_hyena.options.command_line import parse, parse_all
from sd_hyena.options.generate_config import GenerateConfig

TEXT = """# a comment, then an empty line

a red circle on white
 it's a (blue:1.2) square, half-tone - dark -- -k 7 -W 96
größe, 猫 --seed 3 --name_format "a b" -n 2
a red circle on white -- --height=72
"""


def read(path, *flags):
    return parse_all(GenerateConfig, ["-W", "64", "-p", f"@{path}", *flags])


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_each_line_is_one_picture_with_its_own_flags_on_top(tmp_path, encoding):
    path = tmp_path / "prompts.txt"
    path.write_text(TEXT.replace("\n", "\r\n"), encoding, newline="")
    one, two, three, four = read(path, "-k", "5")
    assert [config.prompt for config in (one, two, three, four)] == [
        "a red circle on white", "it's a (blue:1.2) square, half-tone - dark", "größe, 猫", "a red circle on white",
    ]  # fmt: skip
    assert [config.seed for config in (one, two, three, four)] == [5, 7, 3, 5]
    assert [(config.width, config.height) for config in (one, two, four)] == [(64, 64), (96, 96), (64, 72)]
    assert [config.num_images for config in (one, two, three, four)] == [1, 1, 2, 1] and three.name_format == "a b"
    assert all(config.num_images == 3 for config in read(path, "-n", "3")[:2])
    assert one == parse(GenerateConfig, ["-W", "64", "-k", "5", "-n", "1", "-p", "a red circle on white"])


BAD = {
    "a\nb -- -W 65": "line 2: width=65 must be",
    "a -- --sampler ddim": "line 1: unrecognized --sampler",
    "a -- 'open": "line 1: .* cannot be read as flags .No closing quotation",
    "a -- b": "line 1: 'b' behind -- is no flag",
    "-- -W 64": "line 1: '-- -W 64' has no prompt",
    "@other.txt": "line 1: .* has no prompt",
    "a -- --config x.yaml": "line 1: --config is of the whole command",
    "a -- -h": "line 1: -h is of the whole command",
    "a -- --prompt=b": "line 1: --prompt=b is of the whole command",
    "a AND b": "line 1: prompt: 'a AND b' composes prompts",
    "# alone": "holds no prompt; write one a line",
}


@pytest.mark.parametrize("text", BAD)
def test_a_line_that_cannot_be_drawn_is_named_before_any_is(tmp_path, text):
    (tmp_path / "p.txt").write_text(text)
    with pytest.raises(BadInput, match=BAD[text]) as error:
        read(tmp_path / "p.txt")
    assert "p.txt" in str(error.value) and "\n" not in str(error.value)


def test_a_file_that_is_no_unicode_or_not_there_is_refused_and_a_blank_keeps_the_sign(tmp_path):
    (tmp_path / "p.txt").write_bytes("größe".encode("cp1252"))
    with pytest.raises(BadInput, match=r"prompt=.*p\.txt' is no UTF-8 text .byte 0xf6 at 2.; save it as UTF-8"):
        read(tmp_path / "p.txt")
    with pytest.raises(BadInput, match="'gone' is no file of prompts; for a prompt that begins with @ put a blank"):
        read("gone")
    assert parse(GenerateConfig, ["-p", " @gone"]).prompt == " @gone"
    (tmp_path / "p.txt").write_text("a\nb")
    with pytest.raises(BadInput, match="several prompts is more than one drawing"):
        parse(GenerateConfig, ["-p", f"@{tmp_path / 'p.txt'}"])
