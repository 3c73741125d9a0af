import pytest
import yaml

from sd_hyena.errors import BadInput
from sd_hyena.options import former, help
from sd_hyena.options.command_line import from_dict, parse, to_dict
from sd_hyena.options.train_config import TrainConfig

EVERY_OLD_DEFAULT = dict(
    hyena2d_local=9, hyena2d_long="none", hyena2d_rank=4, hyena2d_reach=64, hyena2d_groups=0, hyena2d_filter_order=32,
    hyena2d_content="landmarks", landmarks=128, hyena2d_window=0, hyena2d_gates="diagonal", hyena2d_norm=True,
    hyena_emb_dim=33, hyena_w=3.0,
)  # fmt: skip


@pytest.fixture(autouse=True)
def _said_anew():
    former.note.cache_clear()


@pytest.mark.parametrize(
    "flags, operator_options",
    [
        ("--hyena2d_rank 2", "rank=2"),
        ("--landmarks=64 --no_hyena2d_norm", "landmarks=64,norm=false"),
        ("--hyena2d_long full --hyena2d_local 0 --hyena2d_norm", "local=0,long=full"),
        ("--operator landmarks --landmarks 64", "landmarks=64"),
        ("--operator causal --hyena_emb_dim 5 --hyena_w 1", "emb_dim=5,w=1.0"),
        ("--operator causal --landmarks 64 --hyena2d_rank 2", ""),  # had no effect
        ("--operator_options local=5 --landmarks 64", "local=5,landmarks=64"),
    ],
)
def test_a_former_flag_is_translated_with_a_note(flags, operator_options, capsys):
    config = parse(TrainConfig, flags.split())
    assert config.operator_options == operator_options
    said = capsys.readouterr().out
    assert said.startswith("note: ") and said.count("\n") == 1
    assert f"--operator_options {operator_options or repr('')};" in said
    parse(TrainConfig, flags.split())
    assert not capsys.readouterr().out


def test_new_flags_say_nothing_and_help_does_not_mention_the_former(capsys):
    parse(TrainConfig, ["--operator_options", "rank=2", "--hyena_order", "3"])
    assert not capsys.readouterr().out
    assert "--hyena2d" not in help.text(TrainConfig, everything=True)


def test_a_config_of_the_last_release_means_what_it_meant(tmp_path):
    """It names every option, with its value, whichever the operator."""
    path = tmp_path / "c.yaml"
    now = {k: v for k, v in to_dict(TrainConfig()).items() if k != "operator_options"}
    stored = now | EVERY_OLD_DEFAULT
    assert from_dict(TrainConfig, stored) == TrainConfig(operator_options="content=landmarks")  # its default then
    for operator, expected in (("hyena2d", "content=landmarks,landmarks=64"), ("pointwise", ""), ("safari", "w=1.0")):
        path.write_text(yaml.safe_dump(stored | {"operator": operator, "landmarks": 64, "hyena_w": 1}))
        assert parse(TrainConfig, ["--config", str(path)]).operator_options == expected


def test_flags_win_over_the_former_options_of_a_file(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("landmarks: 256\nhyena2d_local: 5")
    given = ["--config", str(path)]
    assert parse(TrainConfig, given).operator_options == "local=5,landmarks=256"
    assert parse(TrainConfig, [*given, "--landmarks", "64"]).operator_options == "local=5,landmarks=64"
    assert parse(TrainConfig, [*given, "--operator_options", "rank=2"]).operator_options == "rank=2"
    assert parse(TrainConfig, [*given, "--operator", "causal"]).operator_options == ""
    assert parse(TrainConfig, [], {"landmarks": 256}).operator_options == "landmarks=256"  # of a recipe


@pytest.mark.parametrize(
    "content, words",
    [("landmarks: many", "landmarks='many'"), ("hyena2d_norm: 1", "hyena2d_norm=1"), ("landmarks: 0", "landmarks=0")],
)
def test_former_options_are_as_strict_as_they_were(tmp_path, content, words):
    (tmp_path / "c.yaml").write_text(content)
    with pytest.raises(BadInput, match=words):
        parse(TrainConfig, ["--config", str(tmp_path / "c.yaml")])
    with pytest.raises(BadInput, match="landmarks"):
        parse(TrainConfig, ["--landmarks", "many"])
