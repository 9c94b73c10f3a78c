import pytest
import torch

from mmslak import sparsity


def test_snip_is_the_absolute_product():
    got = sparsity.snip(torch.tensor([2.0, -3.0, 0.0]), torch.tensor([-1.0, -2.0, 5.0]))
    assert got.tolist() == [2.0, 6.0, 0.0]
    half = sparsity.snip(torch.full((1,), 1e-5).half(), torch.full((1,), 1e-5).half())
    assert half.dtype == torch.float32
    assert half.item() > 0  # half precision would have underflowed
    with pytest.raises(ValueError, match='differ in shape'):
        sparsity.snip(torch.ones(2), torch.ones(3))


def test_magnitude_is_a_copy():
    tensor = torch.tensor([-1.0, 2.0])
    score = sparsity.magnitude(tensor)
    tensor.zero_()
    assert score.tolist() == [1.0, 2.0]


def test_random_scores_depend_on_their_arguments_alone():
    torch.manual_seed(1)
    first = sparsity.random_scores((3, 4), 0, 'a.weight', 2)
    torch.manual_seed(2)
    torch.rand(5)
    assert torch.equal(first, sparsity.random_scores((3, 4), 0, 'a.weight', 2))
    for other in [(1, 'a.weight', 2), (0, 'b.weight', 2), (0, 'a.weight', 3)]:
        assert not torch.equal(first, sparsity.random_scores((3, 4), *other))
    before = torch.get_rng_state()
    sparsity.random_scores((3,), 0, 'a', 0)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize('seed', [-1, 2**32])
def test_seed_out_of_range(seed):
    with pytest.raises(ValueError, match='seed must be in'):
        sparsity.random_scores((1,), seed, 'a', 0)


def test_magnitude_of_half_precision_ranks_in_float32():
    score = sparsity.magnitude(torch.tensor([-1.5], dtype=torch.bfloat16))
    assert score.dtype == torch.float32
    assert score.tolist() == [1.5]


def test_random_scores_ignore_the_default_dtype():
    expected = sparsity.random_scores((5,), 0, 'a', 1)
    torch.set_default_dtype(torch.float64)
    try:
        got = sparsity.random_scores((5,), 0, 'a', 1)
    finally:
        torch.set_default_dtype(torch.float32)
    assert got.dtype == torch.float32
    assert torch.equal(got, expected)
