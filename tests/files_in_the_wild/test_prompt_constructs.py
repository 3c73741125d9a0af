"""What prompts say beside words: done, or refused with the way out, wherever a prompt is given; never drawn as words."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from sd_hyena.errors import BadInput
from sd_hyena.large.regions import read_regions
from sd_hyena.options.command_line import parse
from sd_hyena.options.generate_config import GenerateConfig
from sd_hyena.options.prompt_constructs import check_text_of, constructs, without_loras
from sd_hyena.text.encoding import weighted_prompts
from tests.gate import sampled

REFUSED = {
    "a [red:blue:.5] fox": "changes the prompt while",
    "a [red:blue:10] fox": "changes the prompt while",
    "a [blue:0.3]": "changes the prompt while",
    "a [red::3]": "changes the prompt while",
    "a [(red:1.2) and b:[c:d:2]:.5]": "changes the prompt while",
    "a [red|blue] fox": "alternates between prompts",
    "a [red|]": "alternates between prompts",
    "(a [x|y]:1.2)": "alternates between prompts",
    "a fox AND a cat": "composes prompts with AND",
    "a fox AND a cat:1.2": "composes prompts with AND",
    "__animal__ in snow": "is a wildcard",
    "a __styles/old-ones__": "is a wildcard",
    "a {fox|cat}": "chooses at random",
    "{2$$a|b|c}": "chooses at random",
    "a ${x=fox}": "chooses at random",
    "a <hypernet:anime:0.8>": "asks for a hypernetwork",
    "a <segment:face>": "asks for something outside",
    "a <lora:fur:1:lbw=FACE>": "write <lora:NAME:WEIGHT>",
    "a <lora:fur:much>": "write <lora:NAME:WEIGHT>",
    "a <lora:fur:nan>": "write <lora:NAME:WEIGHT>",
    "a <lora:fur:1e9>": "write <lora:NAME:WEIGHT>",
    "a <lora:fur:0.5:0.7>": "write <lora:fur:0.7>",
    "a <lora::1>": "no name",
    "a <lora:gone:1>": "give --lora_dir",
}
WORDS = [
    "a fox", "(a:1.2) [b] ((c))", "[a, b: c]", "a: b, 3:4", "[a:b]", "sand and sea", "SAND", "a_b __ c", "snake__case__name",
    "{a}", "a < b > c", "<3", r"\[a|b\]", r"a \[b:c:.5\]", "a | b", "(a|b)", "[", "]", "[a:", "a BREAK b", "[(a|b)]", "x:1]",
    ":-) <:", "a [b (c:1.3)]",
]  # fmt: skip


@pytest.mark.parametrize("text", sampled(REFUSED, 3))
def test_what_is_no_word_is_refused_with_the_way_out_wherever_a_prompt_is_given(text, tmp_path, pipe):
    given = {
        "typed": lambda: parse(GenerateConfig, ["-p", text]),
        "in a picture": lambda: parse(GenerateConfig, ["--from", picture(tmp_path, text)]),
        "negative": lambda: parse(GenerateConfig, ["-p", "a", "-q", text]),
        "in a region": lambda: read_regions(region(tmp_path, text)),
    }
    for place, give in given.items():
        with pytest.raises(BadInput) as error:
            give()
        if "lora" not in text:
            assert REFUSED[text] in str(error.value), place
        assert "\n" not in str(error.value) and len(str(error.value)) < 400
    with pytest.raises(BadInput) as error:
        parse(GenerateConfig, ["-p", text])
    assert REFUSED[text] in str(error.value) and "prompt" in str(error.value)
    with weighted_prompts(pipe), pytest.raises(BadInput):
        pipe.encode_prompt(text, "cpu", 1, False)


@pytest.mark.parametrize("text", WORDS)
def test_words_stay_words(text):
    assert GenerateConfig(prompt=text, negative_prompt=text).prompt == text


def picture(folder, text: str) -> str:
    info = PngInfo()
    info.add_text("parameters", f"{text}\nSteps: 5, Seed: 3")
    Image.new("RGB", (8, 8)).save(folder / "x.png", pnginfo=info)
    return str(folder / "x.png")


def region(folder, text: str):
    (folder / "r.json").write_text(json.dumps({"bbox_controls": [{"x": 0, "y": 0, "w": 1, "h": 1, "prompt": text}]}))
    return folder / "r.json"


@given(st.lists(st.sampled_from([*"[]()|:<>{}_\\ ", "a", "1.5", "AND", "lora", "__", "$$"])).map("".join))
@settings(max_examples=500, deadline=None)
def test_any_text_is_read_or_refused(text):
    try:
        check_text_of(text, "prompt")
    except BadInput as error:
        assert "\n" not in str(error)
        return
    rest, loras = without_loras(text, "prompt")
    assert not list(constructs(rest)) and (loras or rest == text)


def test_long_texts_are_read_quickly():
    for piece in ("[", "[a:", "{a|", "__a", "<lora:", "(a", "[a|", "AND"):
        try:
            check_text_of(piece * 20_000, "prompt")
        except BadInput:
            continue
