from importlib.util import find_spec

import pytest
import torch

from safari import HyenaMixer, HyenaOperator, reference

KEYS_OF_SAFARI = {  # of HazyResearch/safari's HyenaOperator(d_model=6, l_max=10), with their shapes
    "in_proj.weight": (18, 6), "in_proj.bias": (18,), "out_proj.weight": (6, 6), "out_proj.bias": (6,),
    "short_filter.weight": (18, 1, 3), "short_filter.bias": (18,), "filter_fn.bias": (6,),
    "filter_fn.pos_emb.z": (1, 10, 3), "filter_fn.pos_emb.t": (1, 10, 1),
    "filter_fn.implicit_filter.0.weight": (64, 3), "filter_fn.implicit_filter.0.bias": (64,),
    "filter_fn.implicit_filter.1.freq": (1, 64), "filter_fn.implicit_filter.2.weight": (64, 64),
    "filter_fn.implicit_filter.2.bias": (64,), "filter_fn.implicit_filter.3.freq": (1, 64),
    "filter_fn.implicit_filter.4.weight": (64, 64), "filter_fn.implicit_filter.4.bias": (64,),
    "filter_fn.implicit_filter.5.freq": (1, 64), "filter_fn.implicit_filter.6.weight": (6, 64),
    "filter_fn.modulation.deltas": (1, 1, 6),
}  # fmt: skip


def test_the_state_dict_has_the_names_and_shapes_of_safari():
    state = HyenaOperator(6, 10).state_dict()
    assert {name: tuple(value.shape) for name, value in state.items()} == KEYS_OF_SAFARI
    trained = {name for name, _ in HyenaOperator(6, 10).named_parameters(remove_duplicate=False)}
    assert set(KEYS_OF_SAFARI) - trained == {"filter_fn.pos_emb.t", "filter_fn.modulation.deltas"}


def test_one_sine_is_shared_by_all_layers_of_the_filter():
    layers = HyenaOperator(6, 10).filter_fn.implicit_filter
    assert layers[1] is layers[3] is layers[5]


@pytest.mark.parametrize("order", [2, 3, 4])
@pytest.mark.parametrize("l_max, length", [(1, 1), (2, 2), (7, 7), (63, 40), (100, 100)])
def test_the_operator_equals_the_definition_in_values_and_gradients(order, l_max, length):
    torch.manual_seed(order * length)
    operator = HyenaOperator(4, l_max, order=order, filter_order=8, emb_dim=5).double()
    state = {name: value.detach().requires_grad_() for name, value in operator.state_dict().items()}
    state["filter_fn.implicit_filter.1.freq"].requires_grad_()
    x = torch.randn(2, length, 4, dtype=torch.float64, requires_grad=True)
    y, expected = operator(x), reference.hyena_operator(state, x, order)
    # positions are stored in float32, as safari does, so exact arithmetic agrees to about 1e-7
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-6)
    weight = torch.randn_like(y)
    names = [
        "in_proj.weight",
        "out_proj.bias",
        "short_filter.weight",
        "filter_fn.bias",
        "filter_fn.implicit_filter.0.weight",
    ]
    ours = torch.autograd.grad((y * weight).sum(), [x, *(dict(operator.named_parameters())[n] for n in names)])
    theirs = torch.autograd.grad((expected * weight).sum(), [x, *(state[n] for n in names)])
    for name, a, b in zip(["x", *names], ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("order, length", [(2, 5), (3, 9)])
def test_a_normalized_filter_is_divided_behind_the_decay_window(order, length):
    torch.manual_seed(length)
    operator = HyenaOperator(4, 9, order=order, filter_order=8, emb_dim=5, normalized=True).double()
    x = torch.randn(2, length, 4, dtype=torch.float64)
    expected = reference.hyena_operator(operator.state_dict(), x, order, normalized=True)
    torch.testing.assert_close(operator(x), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(operator.filter_fn(length).abs().sum(-1), torch.ones(length, dtype=torch.float64))


def test_a_loaded_state_dict_gives_the_same_output_in_float32():
    torch.manual_seed(0)
    first, second = HyenaOperator(8, 33, order=3), HyenaOperator(8, 33, order=3)
    second.load_state_dict(first.state_dict(), strict=True)
    x = torch.randn(3, 20, 8)
    assert torch.equal(first(x), second(x))
    expected = reference.hyena_operator({k: v.double() for k, v in first.state_dict().items()}, x.double(), 3)
    torch.testing.assert_close(first(x).double(), expected, rtol=1e-5, atol=1e-5)


def test_the_causal_operator_never_sees_the_future():
    torch.manual_seed(0)
    operator = HyenaOperator(4, 12).double()
    x = torch.randn(1, 12, 4, dtype=torch.float64, requires_grad=True)
    for t in (0, 5, 11):
        (seen,) = torch.autograd.grad(operator(x)[0, t].sum(), x)
        assert seen[0, t + 1 :].abs().sum() < 1e-12 < seen[0, : t + 1].abs().sum()


def test_the_bidirectional_mixer_reaches_every_token_from_every_token():
    torch.manual_seed(0)
    mixer = HyenaMixer(2, 9, bidirectional=True, emb_dim=5).double()
    streams = torch.randn(1, 9, 6, dtype=torch.float64, requires_grad=True)
    for t in (0, 4, 8):
        (seen,) = torch.autograd.grad(mixer.mix(streams)[0, t].sum(), streams)
        assert (seen[0].abs().sum(-1) > 1e-9).all()


def test_a_bidirectional_filter_of_a_shorter_sequence_is_the_middle_of_the_longest():
    filters = HyenaMixer(3, 20, bidirectional=True).filter_fn
    torch.testing.assert_close(filters(7), filters(20)[13:26])


NON_DEFAULT = {
    "order": 3, "filter_order": 16, "dropout": 0.5, "filter_dropout": 0.5, "short_filter_order": 5,
    "activation": "gelu", "bidirectional": True, "emb_dim": 7, "w": 10.0, "num_inner_mlps": 1, "modulate": False,
    "shift": 0.3, "fast_decay_pct": 0.1, "slow_decay_pct": 3.0, "target": 1e-4, "normalized": True, "bias": False,
}  # fmt: skip


@pytest.mark.parametrize("name", NON_DEFAULT)
def test_no_knob_is_dead(name):
    def output(**options):
        torch.manual_seed(0)
        mixer = HyenaMixer(4, 11, **options)
        torch.manual_seed(1)
        return mixer.mix(torch.randn(1, 11, 4 * (mixer.order + 1)))

    torch.testing.assert_close(output(), output(), rtol=0, atol=0)
    changed = output(**{name: NON_DEFAULT[name]})
    assert changed.shape == (1, 11, 4) and not torch.allclose(changed, output(), atol=1e-5)


LAYER_OF_SAFARI = dict(order=2, emb_dim=5, filter_order=8, lr=6e-4, wd=0.1, lr_pos_emb=0.0, modulation_lr=2e-4, w=14)


def test_a_layer_config_of_safari_is_taken_with_its_notes_for_the_optimizer():
    filters = HyenaOperator(4, 8, **LAYER_OF_SAFARI).filter_fn
    parameters = dict(filters.named_parameters())
    assert parameters["implicit_filter.0.weight"]._optim == {"lr": 6e-4, "weight_decay": 0.1}
    assert parameters["implicit_filter.1.freq"]._optim == {"lr": 6e-4, "weight_decay": 0.1}
    assert parameters["modulation.deltas"]._optim == {"lr": 2e-4, "weight_decay": 0.0}
    assert "pos_emb.z" not in parameters and "pos_emb.z" in dict(filters.named_buffers())
    assert set(HyenaOperator(4, 8, **LAYER_OF_SAFARI).state_dict()) == set(KEYS_OF_SAFARI)


@pytest.mark.parametrize(
    "activation, expected",
    [(None, lambda y: y), ("identity", lambda y: y), ("linear", lambda y: y), ("swish", torch.nn.SiLU()), ("sigmoid", torch.sigmoid)],
)  # fmt: skip
def test_activations_have_safari_s_names(activation, expected):
    torch.manual_seed(0)
    plain, named = HyenaMixer(4, 8), HyenaMixer(4, 8, activation=activation)
    named.load_state_dict(plain.state_dict())
    streams = torch.randn(1, 8, 12)
    torch.testing.assert_close(named.mix(streams), expected(plain.mix(streams)))


@pytest.mark.parametrize("name", ["num_heads", "inner_factor", "num_blocks"])
def test_what_crashes_or_leaks_in_safari_raises_here(name):
    with pytest.raises(ValueError, match=f"{name}=2"):
        HyenaOperator(4, 8, **{name: 2})


def test_a_sequence_longer_than_l_max_raises_instead_of_being_cut():
    with pytest.raises(ValueError, match="24 tokens exceed l_max=16"):
        HyenaOperator(4, 16)(torch.randn(1, 24, 4))


@pytest.mark.parametrize(
    "options", [{"order": 1}, {"emb_dim": 4}, {"emb_dim": 1}, {"activation": "sin"}, {"short_filter_order": 0}]
)
def test_other_impossible_options_raise(options):
    with pytest.raises(ValueError, match=str(next(iter(options.values())))):
        HyenaOperator(4, 8, **options)


def test_a_misspelt_option_is_an_error():
    with pytest.raises(TypeError, match="ordre"):
        HyenaOperator(4, 8, ordre=3)


def test_fused_bias_needs_flash_attn_and_says_so():
    if find_spec("flash_attn"):
        pytest.skip("it is installed")
    with pytest.raises(ValueError, match="flash-attn"):
        HyenaOperator(4, 8, fused_bias_fc=True)


def test_starting_as_identity_makes_the_mixer_the_product_of_its_streams_plus_the_long_filter():
    for bidirectional in (False, True):
        mixer = HyenaMixer(3, 10, bidirectional=bidirectional)
        mixer.start_as_identity_()
        torch.nn.init.zeros_(mixer.filter_fn.implicit_filter[-1].weight)
        streams = torch.randn(2, 10, 9)
        q, k, v = streams.split(3, dim=-1)
        torch.testing.assert_close(mixer.mix(streams), q * k * v)
