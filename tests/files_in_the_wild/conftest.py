"""The shipped model's tensors as a single file has them."""

import pytest
import torch

from sd_hyena.models.location import model_path
from sd_hyena.models.pipeline import load_pipeline
from tests.files_in_the_wild import layouts

CPU = torch.device("cpu")


@pytest.fixture(scope="session")
def state(shared_pipe):
    return layouts.whole(shared_pipe)


@pytest.fixture(scope="session", autouse=True)
def epsilon_or_velocity_is_told():
    """What a file predicts is asked of its UNet, which takes a step; tested elsewhere."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sd_hyena.models.prediction.predicts_velocity", lambda _: True)
        yield


def loaded(path):
    return load_pipeline(model_path(str(path)), CPU, torch.float32)


def assert_holds(pipe, tensors):
    """Weights of a pipeline are these of a single file, each as its number, bit for bit."""
    found = layouts.whole(pipe)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], value.float()) for name, value in tensors.items())


def assert_same(pipe, other, *parts):
    """Weights of two pipelines, bit for bit; all parts if none are named."""
    for part in parts or ("unet", "vae", "text_encoder"):
        ours, theirs = getattr(pipe, part).state_dict(), getattr(other, part).state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs), part
