import torch

from safari import PointwiseMixer


def test_the_pointwise_mixer_looks_at_no_other_token():
    mixer = PointwiseMixer(4).double()
    streams = torch.randn(2, 9, 12, dtype=torch.float64, requires_grad=True)
    (seen,) = torch.autograd.grad(mixer(streams.split(4, -1), None, None)[0, 3].sum(), streams)
    assert seen[0, 3].abs().sum() > 0 and seen.abs().sum() == seen[0, 3].abs().sum()


def test_permuting_the_tokens_permutes_the_answer():
    mixer, streams, order = PointwiseMixer(4, hidden=16), torch.randn(1, 9, 12), torch.randperm(9)
    torch.testing.assert_close(
        mixer(streams.split(4, -1), None, None)[:, order], mixer(streams[:, order].split(4, -1), None, None)
    )
