"""The Python API: names of the package that are loaded when they are asked for."""

import ast
import inspect

import pytest

import sd_hyena
from tests.conftest import ROOT, command


def test_type_checkers_are_told_the_places_that_python_looks_in():
    tree = ast.parse((ROOT / "sd_hyena" / "__init__.py").read_text("utf-8"))
    (told,) = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    places = {}
    for node in told.body:
        (name,) = node.names
        assert name.asname == name.name  # which makes it public for them
        places[name.name] = node.module.removeprefix("sd_hyena.")
    assert places == sd_hyena.PLACES


def test_every_name_is_there_and_says_what_it_does():
    for name in sd_hyena.__all__:
        thing = getattr(sd_hyena, name)
        assert thing.__name__ == name and inspect.getdoc(thing), name
    assert set(sd_hyena.__all__) <= set(dir(sd_hyena))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        sd_hyena.nothing  # noqa: B018
    with pytest.raises(ImportError):
        from sd_hyena import nothing  # noqa: F401


def test_configs_are_had_without_torch_and_the_rest_when_it_is_asked_for():
    code = "import sys, sd_hyena\nfrom sd_hyena import TrainConfig, GenerateConfig, register_operator\n"
    code += "TrainConfig(), GenerateConfig(), dir(sd_hyena)\nassert 'torch' not in sys.modules\n"
    code += (
        "from sd_hyena import swapped, find_sites\nassert 'torch' in sys.modules and 'diffusers' not in sys.modules\n"
    )
    done = command("-c", code)
    assert done.returncode == 0, done.stderr
