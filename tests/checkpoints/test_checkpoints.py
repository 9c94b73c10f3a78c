import argparse
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer
from mmengine.model import BaseModel
from safetensors.torch import save_file
from torch import nn

from mmslak.checkpoints import pretrained, runs
from mmslak.checkpoints.files import (
    count_parameters,
    read_checkpoint,
    read_state_dict,
    save_state_dict,
)
from mmslak.checkpoints.names import convert
from mmslak.checkpoints.pretrained import load_pretrained
from mmslak.checkpoints.runs import warn_of_refused
from mmslak.cli import convert_checkpoint
from mmslak.errors import CheckpointError
from mmslak.models import SLaK
from tests.golden import GOLDEN, ROOT, slak_options
from tests.toy import records, train

OFFICIAL = GOLDEN / 'slak_decomposed.pth'


def slak(**options) -> SLaK:
    return SLaK(**{**slak_options('slak_decomposed'), **options})


def from_pretrained(path, **options) -> SLaK:
    model = slak(init_cfg=dict(type='Pretrained', checkpoint=str(path), **options))
    model.init_weights()
    return model


def weights(model) -> dict[str, torch.Tensor]:
    return {k: v for k, v in model.state_dict().items() if not re.match(r'norm\d', k)}


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(scope='module')
def official() -> dict[str, torch.Tensor]:
    return weights(from_pretrained(OFFICIAL))


def test_official_file_reaches_every_tensor(official):
    raw = read_state_dict(OFFICIAL)
    assert torch.equal(
        official['stages.2.1.large_kernel.vertical.conv.weight'],
        raw['stages.2.1.large_kernel.LoRA1.conv.weight'],
    )
    assert torch.equal(
        official['stages.2.1.large_kernel.horizontal.bn.running_var'],
        raw['stages.2.1.large_kernel.LoRA2.bn.running_var'],
    )
    assert torch.equal(
        official['stages.0.0.large_kernel.small.conv.weight'],
        raw['stages.0.0.large_kernel.small_conv.conv.weight'],
    )
    assert len(official) == len(raw) - len(['norm.weight', 'norm.bias', 'head.weight', 'head.bias'])


def test_it_says_what_matched(monkeypatch):
    lines = []
    monkeypatch.setattr(pretrained, 'print_log', lambda text, logger: lines.append(text))
    load_pretrained(slak(), OFFICIAL)
    (said,) = lines
    assert '141 of 149 tensors of SLaK matched' in said
    assert 'new: norm0.weight, norm0.bias, norm1.weight and 5 more' in said
    assert 'left in the file: norm.weight, norm.bias, head.weight and 1 more' in said


def test_averaged_weights_when_asked_for(tmp_path, official):
    content = read_checkpoint(OFFICIAL)
    averaged = {k: v + 1 if v.is_floating_point() else v for k, v in content['model'].items()}
    torch.save({**content, 'model_ema': averaged}, tmp_path / 'both.pth')
    live, ema = (
        from_pretrained(tmp_path / 'both.pth'),
        from_pretrained(tmp_path / 'both.pth', use_ema=True),
    )
    assert same(weights(live), official)
    name = 'stages.0.0.pwconv1.weight'
    assert torch.equal(ema.state_dict()[name], official[name] + 1)
    with pytest.raises(CheckpointError, match='no averaged weights'):
        from_pretrained(OFFICIAL, use_ema=True)


class Classifier(BaseModel):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = tiny(out_indices=1, gap_before_final_norm=True)
        self.head = nn.Linear(12, 4)

    def forward(self, x, y, mode='tensor'):
        logits = self.head(self.backbone(x)[0])
        return dict(loss=nn.functional.cross_entropy(logits, y)) if mode == 'loss' else logits


def tiny(**options) -> SLaK:
    arch = dict(depths=[1, 1], dims=[8, 12])
    torch.manual_seed(0)
    defaults = dict(out_indices=(0, 1), width_factor=1.0, layer_scale_init_value=1.0)
    return SLaK(arch, kernel_sizes=(7, 7), **{**defaults, **options})


def reading_averages(path) -> list[dict[str, torch.Tensor]]:
    """A backbone's averaged weights by all the ways to ask for them."""
    model = tiny(init_cfg=dict(type='Pretrained', checkpoint=str(path), use_ema=True))
    model.init_weights()
    found = [weights(model)]
    for publish in ([], ['--publish']):
        out = path.with_name('clean.pth')
        assert convert_checkpoint.main([*publish, '--use-ema', str(path), str(out)]) == 0
        found.append(read_state_dict(out))
    return found


@pytest.mark.parametrize('begin', [0, 6])
def test_averaged_weights_of_a_run(tmp_path, begin):
    """A hook that has not begun keeps copies of the live weights as its averages."""
    hook = dict(type='EMAHook', momentum=0.5, begin_iter=begin)
    runner = train(tmp_path, model=Classifier(), iters=8, save_every=4, hooks=[hook])
    for iteration in (4, 8):
        record = records(runner)[iteration - 1]
        began = iteration >= begin
        own, *whole = reading_averages(tmp_path / f'iter_{iteration}.pth')
        for name, average in record['ema'].items():
            for state in whole:
                assert torch.equal(state[name], average)
            if name.startswith('backbone.stages'):
                assert torch.equal(own[name.removeprefix('backbone.')], average)
                assert torch.equal(average, record['weights'][name]) != began, name


def test_a_run_without_averages_says_so(tmp_path, capsys):
    train(tmp_path, model=Classifier(), iters=1)
    path = tmp_path / 'iter_1.pth'
    with pytest.raises(
        CheckpointError, match=r'iter_1\.pth: no averaged weights in it .keys: meta'
    ):
        load_pretrained(tiny(), path, use_ema=True)
    assert convert_checkpoint.main(['--use-ema', str(path), str(tmp_path / 'out.pth')]) == 2
    assert 'no averaged weights in it' in capsys.readouterr().err


@pytest.mark.parametrize('by_epoch', [True, False])
def test_averaged_weights_of_a_run_of_mmcv(tmp_path, by_epoch):
    """Its hook exchanges weights and buffers at the end of an epoch, which iterations are not."""
    live = {f'backbone.{k}': v for k, v in weights(tiny()).items()}
    averages = {k: v + 1 for k, v in live.items() if not re.search('running|num_batches', k)}
    here, beside = ({**live, **averages}, live) if by_epoch else (live, averages)
    beside = {f'ema_{k.replace(".", "_")}': beside[k] for k in averages}
    config = f"runner = dict(type='{'Epoch' if by_epoch else 'Iter'}BasedRunner')"
    path = tmp_path / 'old.pth'
    torch.save(dict(state_dict={**here, **beside}, meta=dict(config=config, epoch=1)), path)
    own, *whole = reading_averages(path)
    assert all(same(state, {**live, **averages}) for state in whole)
    assert torch.equal(own['stages.0.0.gamma'], averages['backbone.stages.0.0.gamma'])


@pytest.mark.parametrize('form', ['segmentor', 'distributed', 'bare', 'safetensors', 'runner'])
def test_other_files_of_ours(tmp_path, official, form):
    path = tmp_path / f'file.{"safetensors" if form == "safetensors" else "pth"}'
    state = weights(from_pretrained(OFFICIAL))
    if form == 'segmentor':
        whole = {f'backbone.{k}': v for k, v in state.items()}
        torch.save({'state_dict': {**whole, 'decode_head.conv.weight': torch.ones(3)}}, path)
    elif form == 'distributed':
        torch.save({'state_dict': {f'module.backbone.{k}': v for k, v in state.items()}}, path)
    elif form == 'bare':
        torch.save(state, path)
    elif form == 'safetensors':
        save_file(state, path)
    else:  # with the objects that MMEngine's message hub leaves in every checkpoint
        torch.save(
            {
                'state_dict': {f'backbone.{k}': v for k, v in state.items()},
                'message_hub': {'log_scalars': {'train/loss': HistoryBuffer([1.0], [1])}},
                'meta': {'iter': 3, 'path': Path('somewhere')},
                'param_schedulers': [{'milestones': Counter([27, 33])}],
                'args': argparse.Namespace(lr=0.1),
            },
            path,
        )
    assert same(weights(from_pretrained(path)), official)


def test_official_names_load_through_any_loader(official):
    model = slak()
    missing, unexpected = model.load_state_dict(read_state_dict(OFFICIAL), strict=False)
    assert same(weights(model), official)
    assert all(name.startswith('norm') for name in missing)
    assert set(unexpected) == {'norm.weight', 'norm.bias', 'head.weight', 'head.bias'}


def bad_file(kind: str, folder: Path) -> Path:
    path = folder / f'{kind}.pth'
    if kind == 'truncated':
        path.write_bytes(OFFICIAL.read_bytes()[:200_000])
    elif kind == 'text':
        path.write_text('<html>Quota exceeded</html>')
    elif kind == 'empty':
        path.write_bytes(b'')
    elif kind == 'list':
        torch.save([1, 2], path)
    elif kind == 'no_tensors':
        torch.save({'epoch': 3}, path)
    elif kind == 'foreign':
        torch.save({'state_dict': {'layer1.0.conv1.weight': torch.ones(4, 4)}}, path)
    elif kind == 'safetensors':
        path = folder / 'bad.safetensors'
        path.write_bytes(b'\x10\x00\x00\x00\x00\x00\x00\x00garbage')
    return path


@pytest.mark.parametrize(
    ('kind', 'message'),
    [
        ('absent', 'no such checkpoint file'),
        ('truncated', 'truncated, damaged or not a checkpoint'),
        ('text', 'truncated, damaged or not a checkpoint'),
        ('empty', 'the file is empty'),
        ('list', 'holds a list, not a dict'),
        ('no_tensors', r'not a checkpoint \(keys: epoch\)'),
        ('foreign', 'no tensor of the file belongs to SLaK'),
        ('safetensors', 'truncated, damaged or not a checkpoint'),
    ],
)
def test_bad_files_get_one_clear_error(tmp_path, kind, message):
    path = bad_file(kind, tmp_path)
    with pytest.raises(CheckpointError, match=message) as error:
        from_pretrained(path)
    assert str(path) in str(error.value)
    assert '\n' not in str(error.value)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (
            dict(width_factor=1.0),
            r'of another shape \(downsample_layers.0.0.weight is 10×3×4×4, not 8',
        ),
        (dict(kernel_sizes=(31, 49, 47, 13)), 'vertical.conv.weight is 10×1×51×5, not 10×1×31×5'),
        (
            dict(arch=dict(depths=[1, 1, 3, 1], dims=[8, 16, 24, 32])),
            r'missing in the file \(stages.2.2',
        ),
        (
            dict(arch=dict(depths=[1, 1, 1, 1], dims=[8, 16, 24, 32])),
            r'that the model lacks \(stages.2.1',
        ),
        (dict(decomposed=False), 'large_kernel.square.conv.weight'),
    ],
)
def test_another_architecture_is_an_error(options, message):
    with pytest.raises(CheckpointError, match='of another architecture') as error:
        load_pretrained(slak(**options), OFFICIAL)
    assert re.search(message, str(error.value))
    assert str(OFFICIAL) in str(error.value)


def test_a_file_cut_anywhere_gets_one_clear_error(tmp_path):
    whole, path = OFFICIAL.read_bytes(), tmp_path / 'cut.pth'
    torch.save({'state_dict': {'a': torch.ones(8)}}, path)
    small = path.read_bytes()
    cuts = [small[:n] for n in range(1, len(small) - 1, 7)]
    cuts += [whole[: len(whole) * part // 20] for part in range(1, 20)]
    for content in cuts:
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r'cut\.pth'):
            read_checkpoint(path)


class Harmful:
    def __reduce__(self):
        return os.mkdir, ('harm_done',)


@pytest.mark.parametrize('zipped', [True, False])
def test_a_file_that_would_run_code_is_refused(tmp_path, monkeypatch, zipped):
    monkeypatch.chdir(tmp_path)
    torch.save(
        {'state_dict': {'a': torch.ones(1)}, 'x': Harmful()},
        'evil.pth',
        _use_new_zipfile_serialization=zipped,
    )
    with pytest.raises(CheckpointError, match=r'evil\.pth'):
        read_state_dict('evil.pth')
    assert not Path('harm_done').exists()


REFUSED = {
    'range': (range(3), 'would run'),
    'date': (np.datetime64('2020-01-01'), 'datetime64|of type M8'),
    'objects': (np.array([None, 1]), 'an array of type O8'),
    'hook': (Harmful(), r'would run \w+.mkdir'),
}


def message_hub(**values: object) -> dict:
    """A checkpoint with these values in its message hub."""
    scalars = {'train/loss': HistoryBuffer([1.0], [1])}
    model, hub = torch.nn.Linear(2, 2), dict(log_scalars=scalars, runtime_info=values)
    optimizer = torch.optim.Adam(model.parameters())
    optimizer.step(lambda: model(torch.ones(2)).sum().backward())
    state = dict(meta={}, state_dict=model.state_dict(), optimizer=optimizer.state_dict())
    return dict(state, message_hub=hub)


@pytest.mark.parametrize('kind', REFUSED)
def test_it_says_what_will_not_be_read_back(tmp_path, monkeypatch, kind):
    lines = []
    monkeypatch.setattr(runs, 'print_log', lambda text, logger, level: lines.append(text))
    value, reason = REFUSED[kind]
    saved = message_hub(bad=value, nested=dict(good=np.array([]), bad=[value]), iter=3)
    warn_of_refused(saved)
    (said,) = lines
    for place in ('bad', 'nested.bad'):
        assert re.search(rf'message_hub\.runtime_info\.{place} \([^()]*({reason})', said)
    assert not re.search('good|iter|optimizer|log_scalars', said)
    torch.save(saved, tmp_path / 'x.pth')
    with pytest.raises(CheckpointError, match=r'x\.pth'):
        read_checkpoint(tmp_path / 'x.pth')


def test_it_says_nothing_of_what_will_be_read_back(monkeypatch):
    monkeypatch.setattr(runs, 'print_log', None)
    warn_of_refused(message_hub(a=np.array([]), b=b'', c=frozenset(), d=Path('a')))


def test_values_that_contain_themselves_will_not_be_read_back(monkeypatch):
    lines = []
    monkeypatch.setattr(runs, 'print_log', lambda text, logger, level: lines.append(text))
    endless = {}
    endless['a'] = endless
    warn_of_refused(message_hub(endless=endless))
    assert 'message_hub.runtime_info.endless.a (a value in it contains itself)' in lines[0]


@pytest.mark.parametrize('suffix', ['pth', 'safetensors'])
def test_convert_checkpoint(tmp_path, capsys, suffix):
    out = tmp_path / 'new' / f'clean.{suffix}'
    source = GOLDEN / 'slak_decomposed_sparse40.pth'
    assert convert_checkpoint.main([str(source), str(out)]) == 0
    dense, nonzero = count_parameters(read_state_dict(source))
    assert f'{dense:,} parameters, {nonzero:,} non-zero' in capsys.readouterr().out
    assert 0.55 < nonzero / dense < 0.75
    assert same(weights(from_pretrained(out)), weights(from_pretrained(source)))
    if suffix == 'pth':  # nothing but tensors in it
        assert torch.load(out, weights_only=True).keys() == {'state_dict'}


def test_converted_classifier_keeps_head_and_final_norm(tmp_path):
    clean = convert(OFFICIAL)
    assert {'backbone.norm.weight', 'head.fc.weight', 'head.fc.bias'} <= clean.keys()
    model = slak(out_indices=(3,), gap_before_final_norm=True)
    load_pretrained(model, OFFICIAL)
    assert torch.equal(model.norm3.weight, clean['backbone.norm.weight'])
    save_state_dict(clean, tmp_path / 'clean.pth')
    again = convert(tmp_path / 'clean.pth')
    assert same(again, clean)


@pytest.mark.parametrize(
    ('source', 'target', 'message'),
    [
        ('absent.pth', 'out.pth', 'absent.pth: no such checkpoint file'),
        ('official', 'out.txt', 'out.txt: expected a name that ends in .pth or .safetensors'),
        ('foreign', 'out.pth', 'no SLaK in it'),
    ],
)
def test_convert_checkpoint_errors(tmp_path, capsys, source, target, message):
    path = tmp_path / source
    if source == 'official':
        shutil.copy(OFFICIAL, path)
    elif source == 'foreign':
        path = bad_file('foreign', tmp_path)
    assert convert_checkpoint.main([str(path), str(tmp_path / target)]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / target).exists()


@pytest.mark.parametrize('suffix', ['pth', 'safetensors'])
def test_publishing_keeps_weights_and_zeros_alone(tmp_path, capsys, suffix):
    weight = torch.tensor([[0.0, 1.5], [-2.0, 0.0]])
    state = {'decode_head.conv.weight': weight, 'backbone.norm.running_mean': torch.zeros(2)}
    run = {'state_dict': state, 'optimizer': {'state': {0: weight}}, 'sparse_training': {'step': 3}}
    torch.save(run, tmp_path / 'iter_3.pth')
    out = tmp_path / f'published.{suffix}'
    assert convert_checkpoint.main(['--publish', str(tmp_path / 'iter_3.pth'), str(out)]) == 0
    assert '4 parameters, 2 non-zero' in capsys.readouterr().out
    content = read_checkpoint(out)
    assert same(content['state_dict'] if suffix == 'pth' else content, state)
    assert set(content) == ({'state_dict'} if suffix == 'pth' else set(state))


def test_convert_checkpoint_as_a_command():
    tool = [sys.executable, ROOT / 'tools' / 'convert_checkpoint.py', '--help']
    done = subprocess.run(tool, capture_output=True, text=True, check=True)
    assert 'Examples:' in done.stdout
