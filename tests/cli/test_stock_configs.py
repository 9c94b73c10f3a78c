"""No config that stock trains on is refused."""

import pytest

from tests.cli.stock_configs import refusals


@pytest.mark.parametrize(('scope', 'least'), [('mmseg', 600), ('mmdet', 400), ('mmpretrain', 300)])
def test_every_stock_config_passes_the_checks(scope, least):
    count, refused = refusals(scope)
    assert count >= least
    assert refused == []
