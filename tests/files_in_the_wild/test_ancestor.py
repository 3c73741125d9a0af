"""The ancestor's own files: `save_model` of safari's operator, which stores neither its options nor shared tensors twice."""

import pytest
import torch
from safetensors.torch import save_model

from safari import HyenaOperator
from sd_hyena.distil.training import train
from sd_hyena.errors import BadInput
from sd_hyena.students.checkpoint import describe, load_students
from tests.conftest import IN01
from tests.distil.test_training import config, weights

SAFARI = dict(operator="safari", operator_options="emb_dim=3", hyena_filter_order=16, n_steps=1)


@pytest.fixture
def ancestor(tmp_path):
    torch.manual_seed(0)
    path = tmp_path / "Hyena-00040.safetensors"
    meta = {"train_width": "8", "train_height": "8", "global_step": "40", "train_steps": "100", "a": "1", "z": "2"}
    save_model(HyenaOperator(32, 64, filter_order=16), str(path), meta)
    return path


def test_training_goes_on_from_an_ancestor_s_file(folder, ancestor):
    before = load_students(ancestor).students["IN01"].state_dict()
    train(
        config(
            folder,
            **SAFARI | {"operator_options": "emb_dim=3,w=9"},
            pretrained_weight=str(ancestor),
            lr=1e-9,
            warmup_steps=0,
        )
    )
    for name, value in weights(folder).items():
        torch.testing.assert_close(value, before[name], atol=1e-6, rtol=1e-5)
    train(config(folder, **SAFARI | {"n_steps": 2}, pretrained_weight=str(folder / "out" / "hyena.safetensors")))
    assert load_students(folder / "out" / "hyena.safetensors").students[IN01].spec.operator == "safari"


@pytest.mark.parametrize(
    "options, said",
    [
        ({}, "IN01 has operator=safari, size=(8, 8) there, operator=hyena2d, size=None in this run; give --operator safari"),
        (SAFARI | {"operator_options": "emb_dim=5"}, "IN01 has emb_dim=3 there, emb_dim=5 in this run; give --operator_options emb_dim=3"),
        (SAFARI | {"height": 128}, "give -W and -H of 8x8 tokens"),
    ],
)  # fmt: skip
def test_what_differs_is_said_with_the_flags_that_mend_it(folder, ancestor, options, said):
    with pytest.raises(BadInput) as error:
        train(config(folder, pretrained_weight=str(ancestor), **options))
    assert said in str(error.value) and "Spec(" not in str(error.value) and "\n" not in str(error.value)


def test_its_metadata_is_told_in_one_order_without_the_names_of_shared_tensors(ancestor):
    said = {describe(load_students(ancestor)) for _ in range(5)}
    (text,) = said  # the header of a .safetensors file comes in another order each time
    named = [line.split(":")[0] for line in text.splitlines()[1:]]
    assert named == ["origin", "a", "global_step", "train_height", "train_steps", "train_width", "z"]
