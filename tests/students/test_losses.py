import torch

from sd_hyena.students.losses import by_timestep, cosine, error_and_spread, relative_mse


def test_relative_mse_is_zero_for_the_target_one_for_its_mean_and_blind_to_scale_and_offset():
    y = torch.randn(3, 7, 5) * torch.rand(5) + 4
    guess = y + torch.randn_like(y)
    assert relative_mse(y, y) == 0
    torch.testing.assert_close(relative_mse(y.mean((0, 1), keepdim=True).expand_as(y), y), torch.tensor(1.0))
    torch.testing.assert_close(relative_mse(guess * 50 - 3, y * 50 - 3), relative_mse(guess, y))


def test_relative_mse_equals_the_definition_in_float64():
    y, guess = torch.randn(2, 9, 4), torch.randn(2, 9, 4)
    mean = y.double().mean((0, 1))
    expected = (guess.double() - y).pow(2).sum() / (y.double() - mean).pow(2).sum()
    torch.testing.assert_close(relative_mse(guess, y).double(), expected, rtol=1e-6, atol=0)


def test_per_sample_errors_see_one_sample_each():
    y = torch.randn(3, 8, 4)
    guess = y.clone()
    guess[1] += 1
    errors, spreads = error_and_spread(guess, y)
    assert errors[0] == errors[2] == 0
    torch.testing.assert_close(errors[1] / spreads[1], relative_mse(guess[1:2], y[1:2]))


def test_the_loss_reaches_the_prediction_and_nothing_else():
    y, guess = torch.randn(2, 5, 3), torch.randn(2, 5, 3, requires_grad=True)
    (gradient,) = torch.autograd.grad(relative_mse(guess, y), guess)
    spread = (y - y.mean((0, 1))).pow(2).sum()
    torch.testing.assert_close(gradient, 2 * (guess.detach() - y) / spread)


def test_half_precision_does_not_overflow_and_a_constant_target_gives_no_nan():
    y = torch.randn(1, 4096, 8).half() * 100
    assert relative_mse((y * 1.1).half(), y).isfinite()
    assert relative_mse(torch.ones(1, 3, 2), torch.zeros(1, 3, 2)).item() > 1e30
    assert relative_mse(torch.zeros(1, 3, 2), torch.zeros(1, 3, 2)) == 0


def test_cosine_is_one_for_any_positive_multiple():
    y = torch.randn(2, 6, 4)
    torch.testing.assert_close(cosine(3 * y, y), torch.tensor(1.0))
    torch.testing.assert_close(cosine(-y, y), torch.tensor(-1.0))


def test_errors_are_split_by_quarters_of_the_timesteps():
    error, spread = torch.tensor([1.0, 2.0, 3.0, 8.0]), torch.tensor([2.0, 4.0, 4.0, 16.0])
    found = by_timestep(error, spread, torch.tensor([0.0, 249.0, 250.0, 999.0]))
    assert {k: float(v) for k, v in found.items()} == {"t000-250": 0.5, "t250-500": 0.75, "t750-1000": 0.5}
