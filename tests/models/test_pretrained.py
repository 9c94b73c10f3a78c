"""init_cfg=dict(type='Pretrained', …) of our backbones: MMEngine's, and strict."""

import json
import os
from pathlib import Path

import pytest
import torch
from mmengine.model.weight_init import PretrainedInit
from torch import nn

from mmslak.checkpoints import schemes
from mmslak.errors import CheckpointError
from mmslak.models import PeLK, SLaK
from tests.file_server import running
from tests.models.ranks import Classifier, in_two_ranks
from tests.toy import build_runner

ARCH = dict(depths=[1, 1, 1, 1], dims=[8, 8, 8, 8])
SMALL = dict(arch=ARCH, kernel_sizes=(7, 7, 7, 7), width_factor=1.0)


@pytest.fixture(scope='module')
def source() -> SLaK:
    torch.manual_seed(0)
    return SLaK(**SMALL)


@pytest.fixture
def server(tmp_path, monkeypatch, source):
    """Serves a segmentor's file; what is downloaded goes to `cache`."""
    monkeypatch.setattr(torch.hub, '_hub_dir', str(tmp_path / 'cache'))
    torch.save({'state_dict': segmentor(source)}, tmp_path / 'slak.pth')
    with running() as server:
        server.files['/slak.pth'] = (tmp_path / 'slak.pth').read_bytes()
        yield server


def segmentor(backbone: nn.Module) -> dict[str, torch.Tensor]:
    state = {f'backbone.{k}': v for k, v in backbone.state_dict().items()}
    return {**state, 'decode_head.conv.weight': torch.ones(3, 3)}


def initialised(checkpoint, **options) -> SLaK:
    cfg = {'type': 'Pretrained', 'checkpoint': str(checkpoint), **options}
    model = SLaK(**SMALL, init_cfg=cfg)
    model.init_weights()
    return model


def same(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.state_dict().items(), other.state_dict().items(), strict=True)
    return all(a == b and torch.equal(v, w) for (a, v), (b, w) in pairs)


@pytest.mark.parametrize('before', ['backbone.', 'module.backbone.', 'teacher.backbone.'])
def test_prefix_with_and_without_a_dot(tmp_path, source, before):
    state = {f'{before}{k}': v for k, v in source.state_dict().items()}
    torch.save({'state_dict': {**state, 'head.weight': torch.ones(3, 3)}}, tmp_path / 'x.pth')
    for prefix in (before, before.removesuffix('.')):
        assert same(initialised(tmp_path / 'x.pth', prefix=prefix), source)


def test_no_prefix(tmp_path, source):
    torch.save(source.state_dict(), tmp_path / 'own.pth')
    torch.save({'state_dict': segmentor(source)}, tmp_path / 'segmentor.pth')
    for name in ('own', 'segmentor'):
        assert same(initialised(tmp_path / f'{name}.pth', prefix=None), source)
    assert same(initialised(tmp_path / 'own.pth', prefix=''), source)


def test_a_prefix_that_the_file_lacks_is_an_error(tmp_path, source):
    torch.save({'state_dict': segmentor(source)}, tmp_path / 'x.pth')
    message = r"x\.pth: no tensor of the file has the prefix 'neck' .*file has backbone\.down"
    with pytest.raises(CheckpointError, match=message):
        initialised(tmp_path / 'x.pth', prefix='neck')


@pytest.mark.parametrize(
    'map_location',
    ['cpu', torch.device('cpu'), {'cuda:0': 'cpu'}, None, lambda storage, at: storage],
)
def test_map_location(tmp_path, source, map_location):
    torch.save({'state_dict': segmentor(source)}, tmp_path / 'x.pth')
    assert same(initialised(tmp_path / 'x.pth', map_location=map_location), source)


@pytest.mark.parametrize('kind', [PretrainedInit, 'mmengine.Pretrained', 'Pretrained'])
def test_all_names_of_mmengines_initializer_are_strict(tmp_path, source, kind):
    """A base of another scope writes that into every dict with a type."""
    state = segmentor(source)
    torch.save({'state_dict': state}, tmp_path / 'x.pth')
    assert same(initialised(tmp_path / 'x.pth', type=kind, _scope_='mmslak'), source)
    del state['backbone.stages.0.0.gamma']
    torch.save({'state_dict': state}, tmp_path / 'x.pth')
    with pytest.raises(CheckpointError, match='1 missing in the file'):
        initialised(tmp_path / 'x.pth', type=kind)


def test_addresses(server, source):
    assert same(initialised(server.url('slak.pth'), map_location='cpu'), source)
    assert same(initialised(server.url('slak.pth'), prefix='backbone'), source)
    assert server.asked == [None]  # the second one is in torch's cache


@pytest.mark.parametrize('scheme', ['torchvision', 'modelzoo', 'mmcls', 'open-mmlab', 'openmmlab'])
def test_names_that_mmengine_has_an_address_for(server, source, scheme, monkeypatch, tmp_path):
    if 'mmlab' in scheme:  # a user's own list of names
        monkeypatch.setenv('MMENGINE_HOME', str(tmp_path))
        names = tmp_path / 'open_mmlab.json'
        names.write_text(json.dumps({'ours': server.url('slak.pth')}))
    else:
        names = dict(ours=server.url('slak.pth'))
        monkeypatch.setitem(schemes.NAMED, scheme, lambda: names)
    assert same(initialised(f'{scheme}://ours'), source)
    with pytest.raises(CheckpointError, match=f'{scheme}://other: no weights of this name'):
        initialised(f'{scheme}://other')


@pytest.mark.parametrize('scheme', ['s3', 'petrel', 'pavi', 'cluster:s3', 'ftp'])
def test_other_addresses_are_refused(scheme):
    with pytest.raises(CheckpointError, match='local files and http addresses only'):
        initialised(f'{scheme}://x/y.pth')


def test_a_name_that_was_renamed():
    from mmengine.runner.checkpoint import get_deprecated_model_names, get_external_models

    old, new = next(iter(get_deprecated_model_names().items()))
    asked = []
    address = get_external_models()[new]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(schemes, '_downloaded', lambda url: asked.append(url) or Path('x'))
        schemes.local_file(f'open-mmlab://{old}')
    assert asked == [address]


def test_addresses_without_a_files_name_are_told_apart(server, source, tmp_path):
    """As those of the released weights: …/s/KEY/download."""
    torch.manual_seed(1)
    other = SLaK(**SMALL)
    for key, model in (('a', source), ('b', other)):
        torch.save({'state_dict': segmentor(model)}, tmp_path / 'file.pth')
        server.files[f'/s/{key}/download'] = (tmp_path / 'file.pth').read_bytes()
    for key, model in (('a', source), ('b', other)):
        assert same(initialised(server.url(f's/{key}/download')), model)


class Harm:
    def __reduce__(self):
        return os.mkdir, ('harm_done',)


def test_no_code_of_a_downloaded_file_is_run(server, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({'state_dict': {}, 'x': Harm()}, 'evil.pth')
    server.files['/evil.pth'] = Path('evil.pth').read_bytes()
    with pytest.raises(CheckpointError, match=r'evil\.pth: refused, because reading it would run'):
        initialised(server.url('evil.pth'))
    assert not Path('harm_done').exists()


@pytest.mark.parametrize(
    ('address', 'message'),
    [('gone.pth', r'gone\.pth: 404'), (None, r'\(no checkpoint given\): no such')],
)
def test_what_is_not_there_is_one_error(server, address, message):
    with pytest.raises(CheckpointError, match=message):
        SLaK(
            **SMALL,
            init_cfg=dict(type='Pretrained', checkpoint=address and server.url(address)),
        ).init_weights()


def test_mmengines_runner_alone(server, source, tmp_path):
    """No tool of ours has replaced MMEngine's ways to load."""
    model = Classifier('SLaK', server.url('slak.pth'))
    runner = build_runner(tmp_path, model=model, iters=1, optimizer=dict(type='SGD', lr=0.0))
    runner.train()
    own = dict(model.backbone.named_parameters())
    assert len(own) > 20
    assert all(torch.equal(p, source.get_parameter(name)) for name, p in own.items())


@pytest.mark.parametrize('kind', ['SLaK', 'PeLK'])
def test_two_ranks_load_and_train(server, tmp_path, kind):
    """One of them downloads; and nothing of the model is left without a gradient."""
    if kind == 'PeLK':
        torch.manual_seed(0)
        file = tmp_path / 'pelk.pth'
        torch.save({'state_dict': segmentor(PeLK(**SMALL))}, file)
        server.files['/pelk.pth'] = file.read_bytes()
    ended = in_two_ranks(kind, tmp_path, server.url(f'{kind.lower()}.pth'))
    assert ended.statuses == [0, 0], ended.output[-2000:]
    assert server.asked == [None]
    first, second = (torch.load(tmp_path / f'rank{i}.pth', weights_only=True) for i in range(2))
    parameters = [k for k in first if 'running' not in k and 'batches' not in k]
    assert all(torch.equal(first[k], second[k]) for k in parameters)
