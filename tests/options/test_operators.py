import inspect

import pytest
import torch
import yaml
from torch import nn

from sd_hyena.errors import BadInput
from sd_hyena.options import help
from sd_hyena.options.command_line import from_dict, parse, to_dict
from sd_hyena.options.operators import OPERATORS, Option, operator_named, options_of, register_operator
from sd_hyena.options.train_config import TrainConfig
from sd_hyena.sites import find_sites, select
from sd_hyena.students.checkpoint import StudentFile, load_students, save_students
from sd_hyena.students.student import Projections, build_student, spec_for
from tests.conftest import IN01

OF_OUR_OWN_CHOICE = {"emb_dim", "w"}  # of 1-D filters: safari's own defaults stay those of its class


@pytest.mark.parametrize("operator", OPERATORS.values(), ids=lambda o: o.name)
def test_what_an_operator_declares_is_what_its_class_takes(operator):
    if operator.ancestors:
        parameters = inspect.signature(operator.resolve().__mro__[-3].__init__).parameters  # HyenaMixer's
        assert set(operator.ancestors) <= set(parameters) and set(operator.options) == OF_OUR_OWN_CHOICE
        return
    taken = options_of(operator.resolve())
    assert {name: (o.default, type(o.default)) for name, o in taken.items()} == {
        name: (o.default, type(o.default)) for name, o in operator.options.items()
    }
    for name, option in taken.items():
        assert option.choices in ((), operator.options[name].choices)
    assert ("heads" in inspect.signature(operator.resolve()).parameters) == operator.heads


@pytest.mark.parametrize("operator", OPERATORS)
def test_help_lists_every_operator_with_its_options(operator):
    lines = help.text(TrainConfig, everything=True).splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"  {operator} "))
    for name, option in operator_named(operator).options.items():
        start += 1
        assert lines[start].split()[0] == f"{name}={str(option.default).lower()}" and option.help in lines[start]


def test_options_are_read_by_their_types_and_what_is_left_out_is_default():
    config = parse(TrainConfig, ["--operator_options", " norm=false, local=5 ,long=separable"])
    given = config.options_of_operator()
    assert (given["norm"], given["local"], given["long"], given["landmarks"]) == (False, 5, "separable", 128)
    assert config.operator_options == "local=5,long=separable,norm=false"
    sequence = TrainConfig(operator="causal", hyena_order=3, operator_options="w=2").options_of_operator()
    assert sequence["order"] == 3 and sequence["w"] == 2.0 and type(sequence["w"]) is float


def test_the_same_options_are_the_same_config_however_they_are_written():
    assert TrainConfig(operator_options="rank=2,local=9") == TrainConfig(operator_options="local=9,, rank=2")
    config = TrainConfig(operator_options="landmarks=64,rank=2")
    assert config.operator_options == "rank=2,landmarks=64"
    assert all(f"{name}=" in to_dict(config)["operator_options"] for name in OPERATORS["hyena2d"].options)
    assert from_dict(TrainConfig, yaml.safe_load(yaml.safe_dump(to_dict(config)))) == config


@pytest.mark.parametrize(
    "operator, options, words",
    [
        ("hyena2d", "rnak=2", "hyena2d has no 'rnak'; it has local, long, rank"),
        ("hyena2d", "landmarks", "not of the form key=value"),
        ("hyena2d", "rank=2,rank=3", "rank is given twice"),
        ("hyena2d", "rank=two", "rank='two' must be a whole number from 1"),
        ("hyena2d", "landmarks=0", "landmarks=0 must be"),
        ("hyena2d", "landmarks=99999999999", "landmarks=99999999999 must be"),
        ("hyena2d", "norm=maybe", "norm='maybe' must be true or false"),
        ("hyena2d", "long=short", "long='short' must be full, separable, axial_1d or none"),
        ("causal", "order=3", "order has a flag of its own, --hyena_order"),
        ("causal", "w=nan", "w=nan must be a number"),
        ("causal", "landmarks=4", "causal has no 'landmarks'; it has emb_dim, w"),
        ("fourier", "", "operator='fourier' is none of hyena2d"),
    ],
)
def test_what_an_operator_does_not_have_or_take_is_named(operator, options, words):
    with pytest.raises(BadInput) as error:
        parse(TrainConfig, ["--operator", operator, "--operator_options", options])
    assert words in str(error.value)


@pytest.fixture
def registry():
    """The operators as they were, afterwards."""
    before = dict(OPERATORS)
    yield
    OPERATORS.clear()
    OPERATORS.update(before)


def an_operator():
    @register_operator("blur", "the mean of a few values before", streams=2)
    class Blur(nn.Module):
        def __init__(self, d_model: int, *, steps: int = 3, weigh: bool = False):
            super().__init__()
            self.steps = steps
            self.weight = nn.Parameter(torch.tensor([1.0] * d_model if weigh else [1.0]))

        def forward(self, streams, x, size):
            _, v = streams
            return self.weight * sum(v.roll(step, dims=1) for step in range(self.steps)) / self.steps

    return Blur


def test_an_operator_of_ones_own_is_trained_saved_and_loaded_like_any(registry, tmp_path, unet):
    Blur = an_operator()
    config = parse(TrainConfig, ["--operator", "blur", "--operator_options", "steps=2,weigh=true"])
    (site,) = select(find_sites(unet), "IN01")
    student = build_student(spec_for(site, config.operator, config.options_of_operator(), (8, 8))).eval()
    assert isinstance(student.mixer, Blur) and student.mixer.steps == 2 and len(student.change) == 2
    save_students(tmp_path / "x.pt", StudentFile({IN01: student}))
    loaded, x = load_students(tmp_path / "x.pt", unet).students[IN01], torch.randn(1, 12, 32)
    projections = Projections.of(unet.get_submodule(IN01))
    assert torch.equal(loaded(x, projections, (3, 4)), student(x, projections, (3, 4)))
    assert "blur" in help.text(TrainConfig, everything=True)
    del OPERATORS["blur"]
    with pytest.raises(BadInput, match=r"operator blur for IN01.*none of"):
        load_students(tmp_path / "x.pt", unet)


def test_a_name_may_be_registered_again_but_not_one_that_ships(registry):
    first, second = an_operator(), an_operator()
    assert OPERATORS["blur"].resolve() is second is not first
    for name in ("hyena2d", "a name"):
        with pytest.raises(ValueError, match="cannot be called"):
            register_operator(name, "")
    with pytest.raises(TypeError, match="layers=None"):
        register_operator("deep", "")(lambda d_model, layers=None: None)


def test_a_rule_is_held_to_text_and_to_values_alike():
    option = Option(3, low=1)
    assert option.read("x", "5") == option.check("x", 5) == 5
    for value in (0, True, 2.5, "5", None, 10**10):
        with pytest.raises(BadInput, match="x="):
            option.check("x", value)
    assert Option(1.0).check("x", 2) == 2.0 and Option(True).read("x", "false") is False
