import copy
import pickle

import pytest
import torch

from safari.filter_cache import FilterCache


class Counted:
    """A weight, a cache of its double, and how often that was made."""

    def __init__(self):
        self.weight, self.cache, self.made = torch.nn.Parameter(torch.arange(4.0)), FilterCache(), 0

    def get(self, key="key"):
        def make():
            self.made += 1
            return (2 * self.weight,)

        return self.cache.get(key, [self.weight], make)[0]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_what_is_made_once_is_kept_for_each_key(mode):
    counted = Counted()
    with mode():
        assert counted.get() is counted.get() and counted.made == 1
        assert counted.get("another") is not counted.get() and counted.made == 2


def test_nothing_is_kept_while_gradients_are_recorded():
    counted = Counted()
    with torch.no_grad():
        counted.get()
    (gradient,) = torch.autograd.grad(counted.get().sum(), counted.weight)
    assert (gradient == 2).all() and counted.made == 2 and counted.cache.held_bytes() == 0


def replaced(counted):
    counted.weight = torch.nn.Parameter(torch.ones(4))


def other_memory(counted):
    counted.weight.data = torch.ones(4)


def loaded(counted):
    torch.nn.ParameterList([counted.weight]).load_state_dict({"0": torch.ones(4)})


def stepped(counted):
    counted.weight.grad = counted.weight.detach() - 1
    torch.optim.SGD([counted.weight], lr=1.0).step()


@pytest.mark.parametrize("change", [replaced, other_memory, loaded, stepped])
def test_a_changed_weight_is_never_answered_with_what_was_kept(change):
    counted = Counted()
    with torch.no_grad():
        counted.get(), counted.get("another")
    change(counted)
    with torch.no_grad():
        assert torch.equal(counted.get(), torch.full((4,), 2.0))
        assert torch.equal(counted.get("another"), torch.full((4,), 2.0))


def test_a_weight_in_another_dtype_is_another_weight():
    counted = Counted()
    with torch.no_grad():
        counted.get()
        counted.weight.data = counted.weight.data.double()
        assert counted.get().dtype == torch.float64


def test_no_more_is_held_than_the_budget(monkeypatch):
    monkeypatch.setattr(FilterCache, "budget", 40)
    counted = Counted()
    with torch.no_grad():
        for key in "abc":
            counted.get(key)
            assert counted.cache.held_bytes() in (16, 32)
        monkeypatch.setattr(FilterCache, "budget", 15)
        counted.get("d")
    assert counted.cache.held_bytes() == 0


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
def test_a_copy_starts_empty(duplicate):
    counted = Counted()
    with torch.no_grad():
        counted.get()
    assert duplicate(counted.cache).held_bytes() == 0 < counted.cache.held_bytes()


def test_weights_of_an_inference_mode_or_a_fake_are_not_trusted():
    with torch.inference_mode():
        counted = Counted()
        counted.get()
        counted.weight.mul_(3)
        assert torch.equal(counted.get(), 6 * torch.arange(4.0))
    with torch._subclasses.FakeTensorMode():
        assert Counted().get().shape == (4,)
