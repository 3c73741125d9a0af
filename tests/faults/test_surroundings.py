"""What is around a run: the network, missing packages, the names of folders, the bytes of the command line."""

import sys

import pytest

from sd_hyena.errors import BadInput
from sd_hyena.files.names import check_format
from sd_hyena.large.regions import Region
from sd_hyena.options.generate_config import GenerateConfig
from sd_hyena.options.train_config import TrainConfig
from tests.faults.conftest import GENERATE, TRAIN, ended

OUTWARD = ("socket.connect", "socket.sendto", "socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr")


def without_network():
    """Python itself tells of every call that reaches out; it is noted and refused."""

    def hook(event, _arguments):
        if event in OUTWARD:
            with open("reached out", "a") as file:
                file.write(event)
            raise OSError("no network")

    sys.addaudithook(hook)


@pytest.mark.slow
def test_nobody_reaches_out_to_train_and_to_draw(folder):
    assert ended(folder, TrainConfig, *TRAIN, fault=without_network).code == 0
    assert ended(folder, GenerateConfig, *GENERATE, "-y", "out/hyena.pt", fault=without_network).code == 0
    assert not (folder / "reached out").exists()


@pytest.mark.gate
def test_without_tensorboard_the_curves_are_in_the_csv_file(folder):
    def missing():
        for name in [name for name in sys.modules if name.startswith(("tensorboard", "torch.utils.tensorboard"))]:
            del sys.modules[name]
        sys.modules["tensorboard"] = None

    done = ended(folder, TrainConfig, *TRAIN, fault=missing)
    assert done.code == 0 and "note: TensorBoard is not installed" in done.out, done.err
    (curves,) = folder.glob("logs/*/csv-*/metrics.csv")
    assert "train/loss/IN01" in curves.read_text() and not list(folder.glob("logs/*/events*"))


def test_a_path_of_four_hundred_characters_with_blanks_and_umlauts_works(folder):
    deep = "/".join(["größe zwei " + "x" * 90] * 4)
    short = [*TRAIN, "-n", 1, "--validate_every_n_steps", 0]
    assert ended(folder, TrainConfig, *short, "-o", deep, "-l", f"{deep}/logs").code == 0
    done = ended(folder, GenerateConfig, *GENERATE, "-n", 1, "-y", f"{deep}/hyena.pt", "-o", deep)
    assert done.code == 0 and (folder / deep / "image_000.png").exists()


def test_a_folder_name_longer_than_the_file_system_takes_is_one_line(tmp_path):
    done = ended(tmp_path, GenerateConfig, *GENERATE, "-o", "x" * 300)
    assert done.code == 2 and "File name too long" in done.err and done.err.count("\n") == 1


def test_bytes_that_are_no_text_are_refused_as_a_prompt_in_one_line(tmp_path):
    """How Python hands over the byte 0xFF of a command line."""
    for option in ("-p", "-q"):
        done = ended(tmp_path, GenerateConfig, *GENERATE, option, "a fox \udcff")
        assert done.code == 2 and "no Unicode text" in done.err and done.err.count("\n") == 1
    with pytest.raises(BadInput, match="no Unicode text"):
        Region(x=0, y=0, w=1, h=1, prompt="\ud800")


@pytest.mark.gate
def test_a_file_of_prompts_written_on_windows_is_read(folder):
    (folder / "prompts.txt").write_bytes("\ufeffa red circle\r\na grüner square\r\n".encode())
    assert ended(folder, TrainConfig, *TRAIN, "-n", 1, "--prompts", "prompts.txt").code == 0
    (folder / "prompts.txt").write_bytes("a grüner square\n".encode("latin-1"))
    done = ended(folder, TrainConfig, *TRAIN, "-n", 1, "--prompts", "prompts.txt")
    assert done.code == 2 and "UTF-8" in done.err and done.err.count("\n") == 1


@pytest.mark.parametrize(
    "name", ["con ", "CON.txt", "aux .{s}", "com¹", "LPT3", "CONIN$", "x.", "x ", "a./b", "a /b{s}", "a\\con", "\ud800"]
)
def test_names_that_windows_cannot_have_are_refused_everywhere(name):
    with pytest.raises(BadInput, match="portable file name"):
        check_format(name, "s")


def test_what_cannot_be_printed_is_spelt_out():
    """An unknown key out of a stranger's picture must not command the terminal."""
    said = str(BadInput("unknown option \x1b[2J\n\u2028\u202e\ud800ü"))
    assert said == "unknown option \\x1b[2J\\n\\u2028\\u202e\\ud800ü"
