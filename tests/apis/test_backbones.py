"""Backbones by name, and their weights from a server on this machine."""

import dataclasses
from pathlib import Path

import pytest
import torch

from mmslak.apis import get_backbone
from mmslak.apis.backbones import BACKBONES
from mmslak.checkpoints.released import RELEASED
from mmslak.errors import CheckpointError, UserError
from mmslak.models import SLaK
from tests import file_server
from tests.golden import GOLDEN, slak_expected, slak_options

OFFICIAL = GOLDEN / 'slak_decomposed.pth'
SMALL = slak_options('slak_decomposed')  # the model of the official file


@pytest.fixture
def released(monkeypatch, tmp_path):
    """A server of the official file under the name slak_tiny, and an empty cache."""
    with file_server.running() as server:
        server.files['/file'] = OFFICIAL.read_bytes()
        backbone = {k: v for k, v in SMALL.items() if k != 'kernel_sizes'}
        kernel = SMALL['kernel_sizes'][0]
        entry = dataclasses.replace(
            RELEASED['slak_tiny'], link=server.url('file'), backbone=backbone, kernel_size=kernel
        )
        monkeypatch.setitem(RELEASED, 'slak_tiny', entry)
        monkeypatch.setattr(SLaK, 'arch_settings', {'tiny': SMALL['arch']})
        monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path / 'hub'))
        monkeypatch.chdir(tmp_path)
        yield server


def small(**options) -> torch.nn.Module:
    return get_backbone('slak_tiny', **{k: v for k, v in SMALL.items() if k != 'arch'}, **options)


def test_released_weights_are_downloaded_once(released, tmp_path):
    backbone = small(pretrained=True).eval()
    expected = slak_expected('slak_decomposed')
    with torch.no_grad():
        maps = backbone(torch.from_numpy(expected['input']))
    assert tuple(found.shape[1] for found in maps) == backbone.out_channels
    assert (tmp_path / 'hub/checkpoints/slak_tiny_in1k.pth').is_file()
    again = small(pretrained=True)
    for name, value in again.state_dict().items():
        assert torch.equal(value, backbone.state_dict()[name]), name
    assert released.asked == [None]


def test_what_get_checkpoint_has_fetched_is_taken(released, tmp_path):
    from mmslak.cli import get_checkpoint

    assert get_checkpoint.main(['slak_tiny']) == 0
    assert Path('checkpoints/slak_tiny_in1k.pth').is_file()
    small(pretrained=True)
    assert released.asked == [None]
    assert not (tmp_path / 'hub').exists()


def test_a_file_of_ones_own(released):
    backbone, other = small(pretrained=OFFICIAL), small()
    saved = torch.load(OFFICIAL, weights_only=False)
    saved = saved.get('model', saved)
    stem = 'downsample_layers.0.0.weight'
    assert torch.equal(backbone.state_dict()[stem], saved[stem])
    assert not torch.equal(other.state_dict()[stem], saved[stem])
    assert released.asked == []
    with pytest.raises(CheckpointError, match='another architecture'):
        small(pretrained=OFFICIAL, in_channels=4)


def test_all_names():
    assert sorted(BACKBONES) == [
        *('pelk_base', 'pelk_small', 'pelk_tiny', 'slak_base', 'slak_small', 'slak_tiny')
    ]
    backbone = get_backbone('pelk_tiny', out_indices=(1, 3), kernel_sizes=(13, 11, 9, 7))
    maps = backbone(torch.rand(1, 3, 64, 64))
    assert [tuple(x.shape) for x in maps] == [(1, 249, 8, 8), (1, 998, 2, 2)]
    assert (backbone.out_channels, backbone.strides) == ((249, 998), (8, 32))


def test_wrong_names():
    with pytest.raises(UserError, match="no backbone 'slak_tny'; the nearest is 'slak_tiny'"):
        get_backbone('slak_tny')
    with pytest.raises(UserError, match='pelk_base: no weights were released for PeLK'):
        get_backbone('pelk_base', pretrained=True)
    with pytest.raises(TypeError, match='kernel_size'):
        get_backbone('slak_tiny', kernel_size=7)
