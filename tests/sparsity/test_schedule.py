import json

import pytest

from mmslak import sparsity
from tests.golden import GOLDEN


def test_cosine_equals_the_reference():
    golden = json.loads((GOLDEN / 'prune_rate_cosine.json').read_text())
    rate = sparsity.cosine(golden['prune_rate'], golden['eta_min'], golden['T_max'])
    for step, expected in golden['after_step'].items():
        assert rate(int(step)) == pytest.approx(expected, abs=1e-12, rel=0)


def test_literal_values():
    assert [sparsity.linear(0.5, 0.1, 4)(step) for step in (0, 2, 4, 9)] == [
        0.5,
        pytest.approx(0.3),
        pytest.approx(0.1),
        pytest.approx(0.1),
    ]
    assert sparsity.constant(0.3)(10**6) == 0.3
    assert sparsity.cosine(0.5, 0.0, 10)(0) == 0.5
    assert sparsity.cosine(0.5, 0.005, 10)(25) == pytest.approx(0.005)


def test_wrong_values():
    with pytest.raises(ValueError, match='start'):
        sparsity.constant(1.5)
    with pytest.raises(ValueError, match='end'):
        sparsity.cosine(0.5, -0.1, 10)
    with pytest.raises(ValueError, match='steps must be at least 1'):
        sparsity.linear(0.5, 0.1, 0)
