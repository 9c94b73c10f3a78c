"""tools/erf.py, complexity.py, demo.py, export.py and sparsity.py on a tiny model, on the CPU."""

import importlib.util
import json
import re
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from mmslak.analysis import complexity, export
from mmslak.apis import model as models
from mmslak.apis.inference import add_legend, outline
from mmslak.apis.model import _remove_pretrained, build_backbone, build_model, read_model_config
from mmslak.checkpoints import files, torch_file
from mmslak.checkpoints.files import count_parameters, read_state_dict
from mmslak.checkpoints.names import convert
from mmslak.cli.parser import add_cfg_options
from mmslak.errors import UserError
from mmslak.ops.plans import locked
from tests import forks, toy
from tests.golden import GOLDEN, ROOT, slak_options

SEGMENTOR = 'configs/demo/upernet_slak_digit_scenes.py'
CLASSIFIER = 'configs/demo/slak_digits.py'
DETECTOR = 'configs/demo/cascade_mask_rcnn_slak_digit_scenes.py'
# All of UperNet's usual pooling, which exporters cannot do by themselves.
TINY = ['--cfg-options', 'model.backbone.arch.dims=[8,16,24,32]', 'model.decode_head.channels=8']
TINY += ['model.decode_head.in_channels=8,16,24,32', 'model.decode_head.pool_scales=1,2,3,6']
TINY += ['model.auxiliary_head.in_channels=24', 'model.auxiliary_head.channels=8']
TINY_CLASSIFIER = ['--cfg-options', 'model.backbone.arch.dims=[8,16,24,32]']
TINY_CLASSIFIER += ['model.head.in_channels=32']
OFFICIAL = GOLDEN / 'slak_decomposed_sparse40.pth'
TOOLS = ('erf', 'complexity', 'demo', 'export', 'sparsity')


# To be called in this process: most of a command's time is its imports.
MODULES = {name: importlib.import_module(f'mmslak.cli.{name}') for name in TOOLS}


@pytest.fixture(autouse=True)
def in_repository(monkeypatch):
    """Tools are run from the repository's root."""
    monkeypatch.chdir(ROOT)


def run(name: str, *arguments: str | Path) -> int:
    return MODULES[name].main([str(argument) for argument in arguments])


def options(pairs: list[str]) -> dict:
    """`--cfg-options …` as the tools read it."""
    import argparse

    parser = argparse.ArgumentParser()
    add_cfg_options(parser)
    return parser.parse_args(pairs).cfg_options


def save(path: Path, config: str | Path, pairs: list[str]) -> Path:
    """A checkpoint as a run writes it: random weights, norms with statistics, class names."""
    torch.manual_seed(0)
    model = build_model(read_model_config(str(config), options(pairs)))
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_mean, -0.1, 0.1)
            torch.nn.init.uniform_(module.running_var, 0.5, 2)
    classes = tuple('abcdefghijk')[: 11 if 'upernet' in str(config) else 10]
    meta = dict(dataset_meta=dict(classes=classes))
    torch.save(dict(state_dict=model.state_dict(), meta=meta), path)
    return path


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory) -> Path:
    return save(tmp_path_factory.mktemp('segmentor') / 'iter_1.pth', ROOT / SEGMENTOR, TINY)


def official_config(folder: Path) -> Path:
    """A config of the classifier in OFFICIAL."""
    arch = slak_options(OFFICIAL.stem)
    classes, channels = read_state_dict(OFFICIAL)['head.weight'].shape
    config = folder / 'official.py'
    config.write_text(
        f"_base_ = '{ROOT / CLASSIFIER}'\n"
        f"model = dict(backbone=dict(_delete_=True, type='mmslak.SLaK', out_indices=3, "
        f'gap_before_final_norm=True, **{arch}), '
        f'head=dict(in_channels={channels}, num_classes={classes}))\n'
    )
    return config


@pytest.fixture(scope='module')
def pictures(tmp_path_factory) -> Path:
    """Two pictures of different sizes, one in a folder of its own, under the same name."""
    folder = tmp_path_factory.mktemp('pictures')
    rng = np.random.default_rng(0)
    (folder / 'more').mkdir()
    for path, size in ((folder / 'a.jpg', (64, 96, 3)), (folder / 'more/a.png', (80, 70, 3))):
        cv2.imwrite(str(path), rng.integers(0, 256, size, dtype=np.uint8))
    return folder


# ---------------------------------------------------------------- what all of them do


@pytest.mark.parametrize('name', TOOLS)
def test_help_has_an_example(name, capsys):
    with pytest.raises(SystemExit) as status:
        run(name, '--help')
    assert status.value.code == 0
    assert re.search(rf'Examples?:\n +mmslak {name} ', capsys.readouterr().out)


def arguments(name: str, config: str | Path, checkpoint: str | Path, out: Path) -> list:
    """A call of a tool that needs config and checkpoint."""
    first = [ROOT / 'docs/images/demo.png'] if name == 'demo' else []
    more = dict(
        erf=['--size', 64, 64, '--count', 1, '--out', out],
        complexity=['--shape', 64],
        demo=['--out', out],
        export=['--to', 'onnx', '--out', out / 'x.onnx'],
    )
    return [*first, config, checkpoint, *more[name]]


@pytest.mark.parametrize('name', ['erf', 'complexity', 'demo', 'export'])
@pytest.mark.parametrize('kind', ['run', 'official'])
def test_a_checkpoint_is_read_once(name, kind, checkpoint, tmp_path, monkeypatch):
    """Also one of the official code, whose names are converted."""
    config, pairs, file = SEGMENTOR, TINY, checkpoint
    if kind == 'official':
        config, pairs, file = official_config(tmp_path), [], OFFICIAL
    reads, load = [], torch_file.load
    monkeypatch.setattr(torch_file, 'load', lambda path: reads.append(path) or load(path))
    assert run(name, *arguments(name, config, file, tmp_path), *pairs) == 0
    assert reads == [file]
    assert files._kept == {}, 'its memory is not free'


WRONG = {
    'config not found': ('configs/nowhere.py', 'none', 'config configs/nowhere.py not found'),
    'broken config': ('{tmp}/broken.py', 'none', 'broken.py cannot be read: SyntaxError'),
    'config of unknown parts': ('{tmp}/unknown.py', 'none', 'unknown.py.*(Nowhere|backbone)'),
    'checkpoint not found': (SEGMENTOR, '{tmp}/none.pth', 'none.pth: no such checkpoint file'),
    'no checkpoint': (SEGMENTOR, '{tmp}/broken.py', 'broken.py: .*not a checkpoint'),
    'other checkpoint': (SEGMENTOR, '{tmp}/other.pth', r'other\.pth.*(architecture|does not fit)'),
}


@pytest.mark.parametrize('case', WRONG)
@pytest.mark.parametrize('name', ['erf', 'complexity', 'demo', 'export'])
def test_wrong_input_costs_one_line(name, case, tmp_path, checkpoint, capsys):
    (tmp_path / 'broken.py').write_text('model = dict(')
    (tmp_path / 'unknown.py').write_text(
        "model = dict(type='Nowhere', backbone=dict(type='Nowhere'))\n"
        "default_scope = 'mmseg'\ntest_dataloader = dict(dataset=dict(pipeline=[]))\n"
    )
    state = torch.load(checkpoint, weights_only=True)['state_dict']
    cut = {k: v[:4] if k.endswith('pwconv1.weight') else v for k, v in state.items()}
    torch.save(dict(state_dict=cut), tmp_path / 'other.pth')
    config, file, says = (part.format(tmp=tmp_path) for part in WRONG[case])
    tiny = TINY if config == SEGMENTOR else []
    assert run(name, *arguments(name, config, file, tmp_path / 'out'), *tiny) == 2
    errors = capsys.readouterr().err.splitlines()
    assert 'Traceback' not in '\n'.join(errors)
    assert sum(line.startswith('error: ') for line in errors) == 1
    assert re.search(says, errors[-1]), errors[-1]


def test_errors_of_a_process(tmp_path):
    ended = forks.run(forks.program, 'tools/sparsity.py', str(tmp_path / 'nowhere'))
    assert ended.statuses == [2]
    assert ended.output.splitlines()[-1].startswith('error: ')
    assert 'nowhere: no such checkpoint or work folder' in ended.output


UNWRITABLE = {
    'demo': {'{tmp}/file': 'a folder is expected', '{tmp}/file/sub': 'Not a directory'},
    'erf': {'{tmp}/file': 'a folder is expected', '/proc/erf': 'cannot be written'},
    'export': {
        '{tmp}': 'a file is expected',
        '{tmp}/file/x.onnx': 'cannot be written',
        '/proc/x.onnx': 'cannot be written',
    },
    'sparsity': {
        '{tmp}': 'a file is expected',
        '{tmp}/file/x.html': 'cannot be written',
        '/proc/x.html': 'cannot be written',
    },
}


@pytest.mark.parametrize(
    ('name', 'out', 'says'),
    [(name, out, says) for name, cases in UNWRITABLE.items() for out, says in cases.items()],
)
def test_outputs_that_cannot_be_written(name, out, says, tmp_path, checkpoint, monkeypatch, capsys):
    """Told of before anything is computed."""
    monkeypatch.setattr(models, '_build', lambda *args: pytest.fail('a model was built'))
    monkeypatch.setattr(
        MODULES['sparsity'], 'read_masks', lambda path: pytest.fail('masks were read')
    )
    (tmp_path / 'file').write_text('words')
    out = out.format(tmp=tmp_path)
    given = [checkpoint] if name == 'sparsity' else [SEGMENTOR, 'none', *TINY]
    given = [ROOT / 'docs/images/demo.png', *given] if name == 'demo' else given
    given += ['--to', 'onnx'] if name == 'export' else []
    assert run(name, *given, '--out', out) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(rf'^error: --out {re.escape(out)}.*{says}', line)
    assert (tmp_path / 'file').read_text() == 'words'
    assert list(tmp_path.iterdir()) == [tmp_path / 'file']


# ---------------------------------------------------------------- erf


def test_erf_of_two_models(checkpoint, pictures, tmp_path, capsys):
    pair = [SEGMENTOR, checkpoint, SEGMENTOR, 'none']
    size = ['--size', 64, 96, '--names', 'trained', 'un/trained', '--device', 'cpu']
    assert run('erf', *pair, '--images', pictures, *size, '--out', tmp_path, *TINY) == 0
    captured = capsys.readouterr()
    assert re.search(r'^trained: area ratios 20% .*99% [\d.]+% \(2 pictures', captured.out, re.M)
    assert '100%' in captured.err  # the progress bar
    report = json.loads((tmp_path / 'erf.json').read_text())
    for name, file in (('trained', 'trained.npy'), ('un/trained', 'un_trained.npy')):
        matrix = np.load(tmp_path / file)
        assert matrix.shape == (64, 96)
        assert matrix.min() >= 0 < matrix.max()
        assert list(report[name]['area_ratios']) == ['20%', '30%', '50%', '99%']
        assert (report[name]['pictures'], report[name]['skipped']) == (2, 0)
    assert not np.array_equal(
        np.load(tmp_path / 'trained.npy'), np.load(tmp_path / 'un_trained.npy')
    )
    assert Image.open(tmp_path / 'erf.png').width > 800


def test_erf_keeps_names_apart_that_make_one_file_name(pictures, tmp_path):
    pair = [SEGMENTOR, 'none', SEGMENTOR, 'none', '--names', 'a/b', 'a_b']
    more = ['--images', pictures, '--count', 1, '--size', 64, 64, '--out', tmp_path]
    assert run('erf', *pair, *more, *TINY) == 0
    assert sorted(path.name for path in tmp_path.glob('*.npy')) == ['1_a_b.npy', '2_a_b.npy']
    assert list(json.loads((tmp_path / 'erf.json').read_text())) == ['1: a/b', '2: a_b']


def write_torn_png(path: Path) -> None:
    """A PNG whose second data chunk lost its name: PIL raises SyntaxError on reading it."""
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (256, 256, 3), dtype=np.uint8)).save(path)
    content = path.read_bytes()
    second = content.index(b'IDAT', content.index(b'IDAT') + 4)
    path.write_bytes(content[:second] + bytes(4) + content[second + 4 :])
    with pytest.raises(SyntaxError), Image.open(path) as file:
        file.load()


@pytest.mark.parametrize('stage', [0, 2])
def test_erf_of_a_stage_of_a_classifier_on_the_default_pictures(stage, tmp_path, capsys):
    """Its config pools and has only the last stage; fields of early stages are small."""
    more = ['--stage', stage, '--count', 2, '--size', 64, 64, '--out', tmp_path]
    assert run('erf', CLASSIFIER, 'none', *more, *TINY_CLASSIFIER[:2]) == 0
    assert '2 photographs that scikit-image ships' in capsys.readouterr().out
    (file,) = tmp_path.glob('*.npy')
    sides = [int((np.load(file).sum(axis) > 0).sum()) for axis in (0, 1)]
    # One block of 13×13 at stride 4: 52 pixels; the third stage sees everything.
    assert sides == ([52, 52] if stage == 0 else [64, 64])


TRANSFORMERS = {  # configs of mmpretrain
    'deit/deit-tiny_4xb256_in1k.py': [],
    'vision_transformer/vit-base-p16_32xb128-mae_in1k.py': ['model.backbone.arch=deit-tiny'],
    't2t_vit/t2t-vit-t-14_8xb64_in1k.py': ['model.backbone.num_layers=2'],
    'xcit/xcit-nano-12-p16_8xb128_in1k.py': [],
    'revvit/revvit-small_8xb256_in1k.py': [],
    'beitv2/benchmarks/beit-base-p16_8xb128-coslr-100e_in1k.py': ['model.backbone.arch=deit-tiny'],
}


@pytest.mark.parametrize('base', TRANSFORMERS)
def test_erf_of_transformers_that_classify(base, tmp_path):
    """Their configs ask for a class token or for an average over positions."""
    (tmp_path / 'c.py').write_text(f"_base_ = 'mmpretrain::{base}'\n")
    more = ['--size', 224, 224, '--count', 1, '--out', tmp_path / 'out', '--names', 'x']
    changes = ['--cfg-options', *TRANSFORMERS[base]] if TRANSFORMERS[base] else []
    assert run('erf', tmp_path / 'c.py', 'none', *more, *changes) == 0
    assert np.load(tmp_path / 'out/x.npy').max() > 0


def test_erf_of_a_backbone_that_adds_a_class_token(tmp_path):
    (tmp_path / 'c.py').write_text(
        "_base_ = 'mmseg::dpt/dpt_vit-b16_8xb2-160k_ade20k-512x512.py'\n"
        'model = dict(backbone=dict(num_layers=2, out_indices=(0, 1)))\n'
    )
    more = ['--size', 224, 224, '--count', 1, '--out', tmp_path / 'out']
    assert run('erf', tmp_path / 'c.py', 'none', *more) == 0


def test_erf_refuses_a_class_token(tmp_path, capsys):
    (tmp_path / 'c.py').write_text("_base_ = 'mmpretrain::tnt/tnt-s-p16_16xb64_in1k.py'\n")
    more = ['--size', 224, 224, '--count', 1, '--out', tmp_path / 'out']
    assert run('erf', tmp_path / 'c.py', 'none', *more) == 2
    (line,) = [e for e in capsys.readouterr().err.splitlines() if e.startswith('error: ')]
    assert re.search(r'the model gives \(1, 384\).*option of its backbone', line)


@pytest.mark.parametrize(
    ('more', 'says'),
    [
        (['--stage', '9'], 'out_indices'),
        (['--images', '{tmp}/nowhere'], 'nowhere: no such folder'),
        (['--images', '{tmp}'], 'no picture in it'),
        (['--images', '{tmp}/bad'], r'none of 1 .*bad\.jpg: not a picture that can be read'),
        (['--images', '{tmp}/torn'], r'none of 1 .*torn\.png: not a picture that can be read'),
        (['--device', 'cuda:77'], 'device cuda:77 cannot be used'),
        (['--size', '3', '3'], 'expected pictures of at least 32×32 pixels, got 3×3'),
    ],
)
def test_erf_refuses(more, says, tmp_path, capsys):
    (tmp_path / 'bad').mkdir()
    if 'bad' in more[1]:
        (tmp_path / 'bad/bad.jpg').write_text('words')
    (tmp_path / 'torn').mkdir()
    if 'torn' in more[1]:
        write_torn_png(tmp_path / 'torn/torn.png')
    more = [part.format(tmp=tmp_path) for part in more]
    assert (
        run('erf', SEGMENTOR, 'none', '--size', 64, 64, '--out', tmp_path / 'o', *more, *TINY) == 2
    )
    assert re.search(rf'^error: .*{says}', capsys.readouterr().err, re.MULTILINE)


def test_erf_leaves_out_what_cannot_be_read(pictures, tmp_path, capsys):
    (tmp_path / 'in').mkdir()
    for name in ('a.jpg', 'more/a.png'):
        (tmp_path / 'in' / Path(name).name).write_bytes((pictures / name).read_bytes())
    (tmp_path / 'in/aa.jpg').write_text('words')
    names = ['--names', 'one', 'two']
    more = ['--images', tmp_path / 'in', '--size', 64, 64, '--out', tmp_path / 'o', *names]
    assert run('erf', SEGMENTOR, 'none', SEGMENTOR, 'none', *more, *TINY) == 0
    captured = capsys.readouterr()
    assert captured.out.count('(2 pictures of 64×64, 1 unreadable)') == 2
    assert captured.err.count('left out: ') == 1  # once for all models
    assert re.search(r'^left out: .*aa\.jpg: not a picture that can be read', captured.err, re.M)
    report = json.loads((tmp_path / 'o/erf.json').read_text())
    for name in ('one', 'two'):
        assert report[name]['unreadable'] == [str(tmp_path / 'in/aa.jpg')]
        assert (report[name]['pictures'], report[name]['skipped']) == (2, 0)


def test_erf_tells_of_nan(checkpoint, pictures, tmp_path, capsys):
    content = torch.load(checkpoint, weights_only=True)
    content['state_dict']['backbone.norm3.weight'][:] = torch.nan
    torch.save(content, tmp_path / 'nan.pth')
    more = ['--images', pictures, '--size', 64, 64, '--out', tmp_path / 'o']
    assert run('erf', SEGMENTOR, tmp_path / 'nan.pth', *more, *TINY) == 2
    assert '2 inputs, all with NaN' in capsys.readouterr().err


# ---------------------------------------------------------------- complexity


def test_complexity_table_and_json_agree(checkpoint, capsys):
    assert run('complexity', SEGMENTOR, checkpoint, '--shape', 64, 96, *TINY) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f'{SEGMENTOR} at 64×96'
    assert run('complexity', SEGMENTOR, checkpoint, '--shape', 64, 96, '--json', *TINY) == 0
    found = json.loads(capsys.readouterr().out)
    assert found['shape'] == [64, 96]
    rows = {line.split()[0]: line.split()[1:] for line in lines[2:]}
    assert list(rows) == [*found['parts'], 'all']
    for name, cost in [*found['parts'].items(), ('all', found['total'])]:
        dense, nonzero = f'{cost["macs"] / 1e9:.2f}', f'{cost["nonzero_macs"] / 1e9:.2f}'
        parameters = [f'{cost["parameters"]:,}', f'{cost["nonzero_parameters"]:,}']
        assert rows[name] == [*parameters, dense, nonzero]
    assert found['parts']['auxiliary_head']['macs'] == 0  # for training only
    assert found['parts']['decode_head']['macs'] > 0
    assert {f'backbone.stages.{i}' for i in range(4)} < set(found['parts'])


def test_complexity_of_an_official_file(tmp_path, capsys):
    """Its names are translated and its zeros counted: 40 % of what its training masked."""
    assert run('complexity', official_config(tmp_path), OFFICIAL, '--json') == 0
    total = json.loads(capsys.readouterr().out)['total']
    counts = count_parameters(convert(OFFICIAL))
    assert (total['parameters'], total['nonzero_parameters']) == counts
    assert total['nonzero_macs'] < 0.7 * total['macs']


def test_complexity_of_a_detector(capsys):
    assert run('complexity', DETECTOR, '--shape', '64', '--json') == 0
    parts = json.loads(capsys.readouterr().out)['parts']
    assert all(parts[name]['macs'] > 0 for name in ('neck', 'rpn_head', 'roi_head'))


# mmseg's own configs, made small.
STOCK = {
    'Mask2FormerHead': (
        'mask2former/mask2former_r50_8xb2-160k_ade20k-512x512.py',
        'decode_head=dict(in_channels=[64, 128, 256, 512], transformer_decoder=dict(num_layers=1), '
        'pixel_decoder=dict(encoder=dict(num_layers=1)))',
    ),
    'PointHead': (
        'point_rend/pointrend_r50_4xb2-80k_cityscapes-512x1024.py',
        'neck=dict(in_channels=[64, 128, 256, 512])',
    ),
}


@pytest.fixture
def stock(tmp_path) -> Callable[[str], Path]:
    """Writes a config with such a head."""

    def write(head: str) -> Path:
        base, small = STOCK[head]
        path = tmp_path / f'{head}.py'
        path.write_text(f"_base_ = 'mmseg::{base}'\nmodel = dict(backbone=dict(depth=18), {small})")
        return path

    return write


@pytest.mark.parametrize('head', STOCK)
def test_complexity_of_a_head_that_takes_more_than_features(head, stock, capsys):
    assert run('complexity', stock(head), '--shape', 64, 96, '--json') == 0
    found = json.loads(capsys.readouterr().out)
    assert found['parts']['backbone.layer4']['macs'] > 0
    assert found['parts']['decode_head']['macs'] > 0


def test_complexity_of_mask2former_adds_its_masks_up(stock):
    """By hand: what its head runs, and 100 queries of 150 classes at every pixel."""
    from mmseg.structures import SegDataSample

    model = build_model(read_model_config(str(stock('Mask2FormerHead'))))
    forward = MODULES['complexity'].forward_of(model, (64, 96), 'mmseg')
    sample = SegDataSample(metainfo=dict(img_shape=(64, 96), batch_input_shape=(64, 96)))
    head = complexity(model, (64, 96), lambda x: model.decode_head(model.extract_feat(x), [sample]))
    whole = complexity(model, (64, 96), forward)
    assert whole.total.macs == head.total.macs + 100 * 150 * 64 * 96


def test_complexity_of_a_segmentor_is_that_of_one_pass(checkpoint):
    """Not of the windows that it slides."""
    pairs = [*TINY, 'model.test_cfg.mode=slide', 'model.test_cfg.crop_size=(64,64)']
    pairs += ['model.test_cfg.stride=(32,32)']
    cfg = read_model_config(SEGMENTOR, options(pairs))
    model = build_model(cfg, str(checkpoint))
    forward = MODULES['complexity'].forward_of(model, (64, 96), 'mmseg')
    assert complexity(model, (64, 96), forward) == complexity(model, (64, 96))


def test_complexity_tells_of_a_size_that_does_not_run(capsys):
    assert run('complexity', SEGMENTOR, '--shape', 3, *TINY) == 2
    assert 'does not run on a picture of 3×3' in capsys.readouterr().err.splitlines()[-1]


# ---------------------------------------------------------------- demo


def read(folder: Path) -> list[dict]:
    return json.loads((folder / 'predictions.json').read_text())


def test_demo_of_a_segmentor_names_what_it_cannot_read(checkpoint, pictures, tmp_path, capsys):
    bad = tmp_path / 'bad.jpg'
    bad.write_text('words')
    given = [pictures, bad, tmp_path / 'gone.jpg']
    assert run('demo', *given, SEGMENTOR, checkpoint, '--out', tmp_path / 'out', *TINY) == 2
    captured = capsys.readouterr()
    assert re.search(
        rf'^error: 2 of 4 inputs left out: {bad}: cannot be read as picture or video; '
        r'.*gone\.jpg: cannot be read as picture or video$',
        captured.err,
        re.MULTILINE,
    )
    assert '100%' in captured.err
    first, second = read(tmp_path / 'out')
    assert [Path(e['input']).name for e in (first, second)] == ['a.jpg', 'a.png']
    assert [e['overlay'] for e in (first, second)] == ['a.png', 'a_2.png']  # of one name
    for entry, size in ((first, (64, 96)), (second, (80, 70))):
        labels = np.asarray(Image.open(tmp_path / 'out' / entry['labels']))
        assert labels.shape == size
        counts = {c['label']: c['pixels'] for c in entry['classes']}
        assert counts == {i: int((labels == i).sum()) for i in np.unique(labels)}
        assert all(c['name'] == 'abcdefghijk'[c['label']] for c in entry['classes'])
        overlay = Image.open(tmp_path / 'out' / entry['overlay'])
        assert overlay.width == size[1]
        assert overlay.height > size[0]  # the legend


def test_demo_writes_no_label_map_over_a_picture(checkpoint, pictures, tmp_path):
    given = [tmp_path / 'a.jpg', tmp_path / 'a_labels.jpg']
    for path in given:
        path.write_bytes((pictures / 'a.jpg').read_bytes())
    assert run('demo', *given, SEGMENTOR, checkpoint, '--out', tmp_path / 'out', *TINY) == 0
    written = [entry[key] for entry in read(tmp_path / 'out') for key in ('overlay', 'labels')]
    assert len(set(written)) == 4
    assert all((tmp_path / 'out' / name).is_file() for name in written)


def test_demo_keeps_what_it_found_in_other_pictures(checkpoint, pictures, tmp_path, capsys):
    out, first, other = tmp_path / 'out', pictures / 'a.jpg', pictures / 'more/a.png'
    model = [SEGMENTOR, checkpoint, '--out', out, *TINY]
    assert run('demo', first, *model) == 0
    (before,) = read(out)
    drawn = (out / 'a.png').read_bytes()
    assert run('demo', other, *model) == 0
    entries = read(out)
    assert entries[0] == before
    assert [entry['overlay'] for entry in entries] == ['a.png', 'a_2.png']
    assert (out / 'a.png').read_bytes() == drawn
    model[1] = 'none'
    assert run('demo', first, *model) == 0  # replaced where it is
    assert [entry['overlay'] for entry in read(out)] == ['a.png', 'a_2.png']
    assert [entry['checkpoint'] for entry in read(out)] == ['none', str(checkpoint)]
    assert len(list(out.iterdir())) == 5

    (out / 'predictions.json').write_text('{"mine": 1}')
    capsys.readouterr()
    assert run('demo', first, *model) == 2
    assert 'is not one that mmslak demo has written' in capsys.readouterr().err
    assert (out / 'predictions.json').read_text() == '{"mine": 1}'


def test_two_demos_in_one_folder(checkpoint, pictures, tmp_path, capsys):
    given = [pictures / 'a.jpg', SEGMENTOR, checkpoint, '--out', tmp_path, *TINY]
    with locked(tmp_path):
        assert run('demo', *given) == 2
    assert f'--out {tmp_path}: another demo is writing there' in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    assert run('demo', *given) == 0


def test_demo_of_a_video(checkpoint, tmp_path):
    video = cv2.VideoWriter(str(tmp_path / 'v.avi'), cv2.VideoWriter_fourcc(*'MJPG'), 5, (96, 64))
    assert video.isOpened()
    for shade in (0, 90, 250):
        video.write(np.full((64, 96, 3), shade, np.uint8))
    video.release()
    (tmp_path / 'w.mp4').write_bytes(b'no video')
    given = [tmp_path / 'v.avi', tmp_path / 'w.mp4']
    assert run('demo', *given, SEGMENTOR, checkpoint, '--out', tmp_path / 'out', *TINY) == 2
    (entry,) = read(tmp_path / 'out')
    assert len(entry['frames']) == 3
    assert entry['fps'] == 5
    written = cv2.VideoCapture(str(tmp_path / 'out' / entry['overlay']))
    frames = [written.read()[1] for _ in range(3)]
    assert all(frame.shape == (64 + 40, 96, 3) for frame in frames)
    assert not written.read()[0]
    brightness = [frame[:64].mean() for frame in frames]
    assert brightness == sorted(brightness)


def write_video(path: Path, size: tuple[int, int], codec: str, count: int) -> None:
    """A black video; size is (width, height)."""
    video = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*codec), 25, size)
    assert video.isOpened()
    for _ in range(count):
        video.write(np.zeros((*size[::-1], 3), np.uint8))
    video.release()


@pytest.mark.parametrize('config', [SEGMENTOR, DETECTOR])
def test_demo_goes_on_where_the_model_does_not_run(config, pictures, tmp_path, capsys):
    given = [tmp_path / 'dot.png', tmp_path / 'flat.png', pictures / 'a.jpg']
    cv2.imwrite(str(given[0]), np.zeros((1, 1, 3), np.uint8))
    cv2.imwrite(str(given[1]), np.zeros((3, 1500, 3), np.uint8))
    more = ['--out', tmp_path / 'out', *(TINY if config == SEGMENTOR else [])]
    status = run('demo', *given, config, 'none', *more)
    errors = [e for e in capsys.readouterr().err.splitlines() if e.startswith('error: ')]
    assert [entry['input'] for entry in read(tmp_path / 'out')][-1] == str(given[2])
    assert len(read(tmp_path / 'out')) == 2
    assert status == 2
    assert len(errors) == 1
    assert re.match('error: 1 of 3 inputs left out: ', errors[0])
    says = r'flat\.png: the model does not run on it: (.*expected pictures|.*resize)'
    assert re.search(says, errors[0]), errors[0]
    wanted = ['a.png', 'a_labels.png', 'dot.png', 'dot_labels.png', 'predictions.json']
    if config == SEGMENTOR:
        assert sorted(path.name for path in (tmp_path / 'out').iterdir()) == wanted


def test_demo_leaves_out_a_video_on_which_the_model_does_not_run(pictures, tmp_path, capsys):
    from mmslak.apis.inference import Predictor

    write_video(tmp_path / 'v.avi', (96, 64), 'MJPG', 3)
    given, out = [tmp_path / 'v.avi', pictures / 'a.jpg'], tmp_path / 'out'
    predict, frames = Predictor.__call__, []

    def fails_on_the_second_frame(self, path):
        frames.append(path)
        if len(frames) == 2:
            raise UserError('the model does not run on it: too odd')
        return predict(self, path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Predictor, '__call__', fails_on_the_second_frame)
        assert run('demo', *given, SEGMENTOR, 'none', '--out', out, *TINY) == 2
    says = (
        r'^error: 1 of 2 inputs left out: .*v\.avi: frame 2: the model does not run on it: too odd$'
    )
    assert re.search(says, capsys.readouterr().err, re.MULTILINE)
    assert [Path(entry['input']).name for entry in read(out)] == ['a.jpg']
    assert not (out / 'v.mp4').exists()  # half of it


@pytest.mark.parametrize(('suffix', 'codec'), [('.mpg', 'PIM1'), ('.wmv', 'WMV2')])
def test_demo_of_a_named_video_of_any_suffix(suffix, codec, tmp_path):
    write_video(tmp_path / f'v{suffix}', (96, 64), codec, 3)
    given = [tmp_path / f'v{suffix}', SEGMENTOR, 'none', '--out', tmp_path / 'out', *TINY]
    assert run('demo', *given) == 0
    (entry,) = read(tmp_path / 'out')
    assert len(entry['frames']) == 3
    assert entry['overlay'] == 'v.mp4'


def test_demo_of_a_detector(pictures, tmp_path):
    """Untrained, so that something is found below any useful score."""
    more = ['--out', tmp_path, '--score-thr', '0.05']
    assert run('demo', pictures / 'a.jpg', DETECTOR, 'none', *more) == 0
    (entry,) = read(tmp_path)
    assert entry['size'] == [64, 96]
    assert entry['instances']
    for found in entry['instances']:
        assert found['score'] >= 0.05
        assert len(found['bbox']) == 4
        assert found['mask']['size'] == [64, 96]
        assert found['name'] == str(found['label'])  # digits
    drawn = np.asarray(Image.open(tmp_path / 'a.png')).astype(int)
    original = cv2.imread(str(pictures / 'a.jpg'))[..., ::-1]
    assert drawn.shape == original.shape
    assert (np.abs(drawn - original).max(-1) > 30).mean() > 0.01


def test_demo_of_a_classifier(pictures, tmp_path):
    checkpoint = save(tmp_path / 'c.pth', CLASSIFIER, TINY_CLASSIFIER)
    more = ['--out', tmp_path / 'out', *TINY_CLASSIFIER]
    assert run('demo', pictures / 'a.jpg', CLASSIFIER, checkpoint, *more) == 0
    (entry,) = read(tmp_path / 'out')
    scores = [c['score'] for c in entry['classes']]
    assert len(scores) == 5
    assert scores == sorted(scores, reverse=True)
    assert all(c['name'] == 'abcdefghij'[c['label']] for c in entry['classes'])
    assert Image.open(tmp_path / 'out/a.png').size == (96, 64)


def test_demo_draws_the_picture_that_the_classifier_sees(tmp_path):
    """It is turned as its file says, and 16 bits are not cut off at 255."""
    grey = np.repeat(np.linspace(0, 255, 96, dtype=np.uint8)[None], 64, axis=0)
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / 'deep.png')
    turned = Image.Exif()
    turned[0x0112] = 6  # orientation: to be turned clockwise by a quarter
    Image.fromarray(grey).convert('RGB').save(tmp_path / 'turned.jpg', exif=turned)
    given = [tmp_path / 'deep.png', tmp_path / 'turned.jpg']
    more = ['--out', tmp_path / 'out', *TINY_CLASSIFIER]
    assert run('demo', *given, CLASSIFIER, 'none', *more) == 0
    sizes = [entry['size'] for entry in read(tmp_path / 'out')]
    assert sizes == [[64, 96], [96, 64]]
    deep, turned = (
        np.asarray(Image.open(tmp_path / 'out' / f'{name}.png')).astype(int)
        for name in ('deep', 'turned')
    )
    # Right and bottom: what is drawn is at the top left.
    assert np.abs(deep[-4:, -20:] - grey[-4:, -20:, None]).max() < 12
    assert np.abs(turned[-20:, -4:] - grey[-4:, -20:].T[..., None]).max() < 12


def test_demo_without_any_input(tmp_path, capsys):
    assert run('demo', tmp_path / 'gone.jpg', SEGMENTOR, 'none', *TINY) == 2
    assert 'gone.jpg: no such picture, folder or video' in capsys.readouterr().err


def test_demo_never_writes_over_its_input(pictures, tmp_path, capsys):
    picture = tmp_path / 'a.png'
    picture.write_bytes((pictures / 'more/a.png').read_bytes())
    before = picture.read_bytes()
    assert run('demo', tmp_path, SEGMENTOR, 'none', '--out', tmp_path / '.', *TINY) == 2
    assert 'a.png is in it and could be overwritten' in capsys.readouterr().err
    assert picture.read_bytes() == before


def test_demo_wants_a_config_of_a_known_library(tmp_path, capsys):
    (tmp_path / 'c.py').write_text("model = dict(type='A')\ndefault_scope = 'mmengine'\n")
    picture = ROOT / 'docs/images/demo.png'
    assert run('demo', picture, tmp_path / 'c.py', 'none', '--out', tmp_path) == 2
    assert "of scope 'mmengine': expected one of mmseg, mmdet" in capsys.readouterr().err


def test_regions_have_borders_of_their_colour():
    labels = np.zeros((4, 6), np.int64)
    labels[:, 3:] = 1
    labels[3] = 255  # of no class
    grey = np.full((4, 6, 3), 7, np.uint8)
    drawn = outline(grey, labels, [(250, 0, 0), (0, 250, 0)])
    assert drawn[..., 0].tolist() == [[7, 7, 250, 0, 7, 7]] * 2 + [[250] * 3 + [0] * 3, [7] * 6]
    assert (grey == 7).all()
    assert (outline(grey, np.ones((4, 6), int), [(0, 0, 0), (1, 1, 1)]) == 7).all()  # one region


def test_legend_has_every_class_or_as_many_rows_as_asked_for():
    picture = np.zeros((10, 60, 3), np.uint8)
    legend = [('one', (255, 0, 0)), ('two', (0, 255, 0)), ('three', (0, 0, 255))]
    full = add_legend(picture, legend)
    for _, colour in legend:
        assert (full == colour).all(-1).sum() > 80
    cut = add_legend(picture, legend, rows=1)
    assert cut.shape == (30, 60, 3)
    assert not (cut == legend[2][1]).all(-1).any()


# ---------------------------------------------------------------- export


def reference(checkpoint: Path, x: torch.Tensor) -> torch.Tensor:
    """Scores of the segmentor itself, in its picture's size."""
    model = build_model(read_model_config(SEGMENTOR, options(TINY)), str(checkpoint))
    return torch.nn.functional.interpolate(
        model(x, mode='tensor'), x.shape[2:], mode='bilinear', align_corners=False
    )


def test_export_of_upernet_to_onnx(checkpoint, tmp_path, capsys):
    path = tmp_path / 'upernet.onnx'
    arguments = [SEGMENTOR, checkpoint, '--to', 'onnx', '--out', path, '--shape', 64, 96]
    assert run('export', *arguments, *TINY) == 0
    printed = re.findall(r'^(\d+)×(\d+): max relative error (\S+)', capsys.readouterr().out, re.M)
    assert [p[:2] for p in printed] == [('64', '96'), ('91', '149')]
    assert all(float(error) <= 1e-4 for *_, error in printed)
    session = onnxruntime.InferenceSession(str(path), providers=['CPUExecutionProvider'])
    x = torch.randn(2, 3, 70, 45)  # of neither size
    (scores,) = session.run(['scores'], {'input': x.numpy()})
    assert export.relative_error(torch.from_numpy(scores), reference(checkpoint, x)) <= 1e-4
    values = session.get_modelmeta().custom_metadata_map
    assert json.loads(values['mean'])[0] == pytest.approx(123.675)
    assert json.loads(values['channels']) == 'RGB'
    assert json.loads(values['classes']) == list('abcdefghijk')


def test_export_of_the_fused_backbone(checkpoint, tmp_path, capsys):
    path = tmp_path / 'backbone.onnx'
    arguments = [SEGMENTOR, checkpoint, '--to', 'onnx', '--backbone-only', '--out', path]
    assert run('export', *arguments, '--shape', 64, 64, *TINY) == 0
    assert 'outputs stage0, stage1, stage2, stage3' in capsys.readouterr().out
    backbone = build_backbone(read_model_config(SEGMENTOR, options(TINY)), str(checkpoint))
    x = torch.randn(1, 3, 77, 53)
    for got, wanted in zip(export.onnx_runner(path)(x), backbone(x), strict=True):
        assert export.relative_error(got, wanted) <= 1e-4


def test_export_to_torchscript(checkpoint, tmp_path):
    arguments = [SEGMENTOR, checkpoint, '--to', 'torchscript', '--out', tmp_path / 'x.ts']
    assert run('export', *arguments, '--shape', 64, 64, *TINY) == 0
    extra = dict(classes='')
    loaded = torch.jit.load(str(tmp_path / 'x.ts'), _extra_files=extra)
    assert json.loads(extra['classes']) == list('abcdefghijk')
    x = torch.randn(1, 3, 50, 80)
    assert export.relative_error(loaded(x), reference(checkpoint, x)) <= 1e-4


def test_export_to_safetensors(checkpoint, tmp_path):
    path = tmp_path / 'x.safetensors'
    arguments = [SEGMENTOR, checkpoint, '--to', 'safetensors', '--out', path]
    assert run('export', *arguments, '--shape', 64, 64, *TINY) == 0
    cfg = read_model_config(SEGMENTOR, options(TINY))
    model = build_model(cfg)
    model.backbone.switch_to_deploy()
    with safe_open(path, 'pt') as file:
        model.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
        assert json.loads(file.metadata()['std'])
    x = torch.randn(1, 3, 64, 64)
    scores = model(x, mode='tensor')
    scores = torch.nn.functional.interpolate(scores, (64, 64), mode='bilinear')
    assert export.relative_error(scores, reference(checkpoint, x)) <= 1e-4


def test_export_of_a_classifier(tmp_path):
    checkpoint = save(tmp_path / 'c.pth', CLASSIFIER, TINY_CLASSIFIER)
    arguments = [CLASSIFIER, checkpoint, '--to', 'onnx', '--shape', 64, 64, *TINY_CLASSIFIER]
    assert run('export', *arguments) == 0
    (scores,) = export.onnx_runner(tmp_path / 'c.onnx')(torch.randn(3, 3, 40, 50))
    assert scores.shape == (3, 10)


def test_export_of_a_detector_is_its_backbone(tmp_path, capsys):
    arguments = [DETECTOR, 'none', '--to', 'onnx', '--out', tmp_path / 'd.onnx', '--shape', 64, 64]
    assert run('export', *arguments) == 2
    assert '--backbone-only' in capsys.readouterr().err.splitlines()[-1]
    assert run('export', *arguments, '--backbone-only') == 0


@pytest.mark.parametrize('head', STOCK)
def test_export_refuses_a_head_that_takes_more_than_features(head, stock, tmp_path, capsys):
    path = tmp_path / 'x.onnx'
    assert run('export', stock(head), 'none', '--to', 'onnx', '--out', path) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert re.match(rf'error: .*{head}.* is no graph of a picture alone', error), error
    assert '--backbone-only' in error
    assert not path.exists()


def test_export_that_disagrees_leaves_no_file(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(export.AveragingPool2d, 'forward', lambda self, x: x[..., :1, :1])
    path = tmp_path / 'x.onnx'
    arguments = [SEGMENTOR, checkpoint, '--to', 'onnx', '--out', path, '--shape', 64, 64]
    assert run('export', *arguments, *TINY) == 2
    assert re.search(r"at 64×64: output 'scores' differs", capsys.readouterr().err)
    assert not path.exists()


def test_export_never_writes_over_the_checkpoint(checkpoint, tmp_path, capsys):
    arguments = [SEGMENTOR, checkpoint, '--to', 'onnx', '--out', checkpoint]
    assert run('export', *arguments, *TINY) == 2
    assert 'is the checkpoint itself' in capsys.readouterr().err


# ---------------------------------------------------------------- models with a teacher

ATTO = 'model.student.backbone.arch=atto'
DISTILLED = {
    'convnext_t_l2s_slak_t_imagenet.py': [ATTO, 'model.student.head.in_channels=320'],
    'upernet_convnext_t_l2s_slak_t_ade20k.py': [
        ATTO,
        'model.student.decode_head.in_channels=40,80,160,320',
        'model.student.decode_head.channels=8',
        'model.student.auxiliary_head.in_channels=160',
    ],
}


@pytest.mark.parametrize('name', DISTILLED)
def test_of_a_model_with_a_teacher_the_student_is_seen(name, pictures, tmp_path, capsys):
    config, tiny = f'configs/{name}', ['--cfg-options', *DISTILLED[name]]
    assert run('complexity', config, '--shape', 64, '--json', *tiny) == 0
    found = json.loads(capsys.readouterr().out)
    student = build_model(read_model_config(config, options(tiny)))
    assert type(student).__name__ in ('ImageClassifier', 'EncoderDecoder')
    assert found['total']['parameters'] == sum(p.numel() for p in student.parameters())
    assert found['parts']['backbone.stages.0']['macs'] > 0

    more = ['--images', pictures, '--count', 1, '--size', 64, 64, '--out', tmp_path, '--names', 'x']
    assert run('erf', config, 'none', *more, *tiny) == 0
    assert np.load(tmp_path / 'x.npy').max() > 0

    graph = tmp_path / 'x.onnx'
    more = ['--to', 'onnx', '--out', graph, '--shape', 64, 64]
    assert run('export', config, 'none', *more, *tiny) == 0
    (scores,) = export.onnx_runner(graph)(torch.randn(1, 3, 40, 50))
    assert scores.shape == ((1, 1000) if 'imagenet' in name else (1, 150, 40, 50))


# ---------------------------------------------------------------- sparsity


@pytest.fixture(scope='module')
def sparse_run(tmp_path_factory) -> Path:
    """Work folder of a run with dynamic sparsity."""
    folder = tmp_path_factory.mktemp('sparse')
    toy.train(folder, dict(sparsity=0.4, init='uniform', update_interval=2), iters=8)
    return folder


def test_report_of_a_run(sparse_run, tmp_path, capsys):
    assert run('sparsity', sparse_run) == 0
    assert f'{toy.KEPT} of {toy.WEIGHTS} weights active (59.94%)' in capsys.readouterr().out
    page = (sparse_run / 'sparsity.html').read_text()
    assert 'by its masks. 4 records' in page
    assert 'strip 9×3' in page
    assert page.count('<img') == 3
    assert run('sparsity', sparse_run / 'iter_8.pth', '--out', tmp_path / 'b/x.html') == 0
    assert (tmp_path / 'b/x.html').read_text() == page


def test_report_of_published_weights(sparse_run, tmp_path, capsys):
    state = torch.load(sparse_run / 'iter_8.pth', weights_only=False)['state_dict']
    torch.save(dict(state_dict=state), tmp_path / 'published.pth')
    assert run('sparsity', tmp_path / 'published.pth') == 0
    page = (tmp_path / 'sparsity.html').read_text()
    assert 'by the zeros of its weights' in page
    assert 'No log of sparse training' in page
    dense = {name: torch.ones_like(w) for name, w in state.items()}
    torch.save(dict(state_dict=dense), tmp_path / 'published.pth')
    assert run('sparsity', tmp_path / 'published.pth') == 0
    assert 'this is a dense model' in (tmp_path / 'sparsity.html').read_text()


def test_report_refuses(sparse_run, tmp_path, capsys):
    def says(source: Path) -> str:
        assert run('sparsity', source) == 2
        return capsys.readouterr().err

    assert 'no checkpoint (.pth) in this folder' in says(tmp_path)
    (tmp_path / 'words.pth').write_text('words')
    assert 'words.pth' in says(tmp_path / 'words.pth')
    content = torch.load(sparse_run / 'iter_8.pth', weights_only=False)
    del content['sparse_training']['masks']['active']['head.weight']
    torch.save(content, tmp_path / 'cut.pth')
    assert 'cut.pth: its masks cannot be read' in says(tmp_path / 'cut.pth')
    torch.save(dict(state_dict=dict(bias=torch.ones(3))), tmp_path / 'flat.pth')
    assert 'no weights of two or four dimensions' in says(tmp_path / 'flat.pth')


def test_initialisers_in_a_list_stay_but_the_pretrained_one(tmp_path):
    model = dict(backbone=dict(init_cfg=[dict(type='Pretrained', checkpoint='x'), dict(type='A')]))
    _remove_pretrained(model)
    assert model['backbone']['init_cfg'] == [dict(type='A')]


@pytest.mark.parametrize(('found', 'chosen'), [('mps', 'cpu'), ('cuda', 'cuda'), ('cpu', 'cpu')])
@pytest.mark.parametrize('tool', ['demo', 'erf'])
def test_no_tool_takes_apples_gpu_unasked(tool, found, chosen, monkeypatch, capsys):
    monkeypatch.setattr(models, 'get_device', lambda: found)
    with pytest.raises(SystemExit):
        MODULES[tool].main(['--help'])
    assert f'cuda:1 … [{chosen}]' in ' '.join(capsys.readouterr().out.split())
