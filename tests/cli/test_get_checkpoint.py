"""`mmslak get-checkpoint`: released files in their old forms, from a server on this machine."""

import argparse
import dataclasses
import functools
import re
import shutil
import sys
import types
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from torch import nn

import mmslak  # noqa: F401  lets configs inherit from `mmseg::…`
from mmslak.apis.model import read_model_config
from mmslak.checkpoints.files import read_state_dict
from mmslak.checkpoints.names import OFFICIAL_BRANCHES, convert
from mmslak.checkpoints.released import RELEASED, Released
from mmslak.cli import get_checkpoint
from mmslak.cli.config_checks import check_pretrained
from mmslak.errors import UserError
from mmslak.models import SLaK
from tests import file_server
from tests.golden import GOLDEN, ROOT, slak_options

OFFICIAL = GOLDEN / 'slak_decomposed.pth'
BACKBONE = slak_options('slak_decomposed')
KERNEL_SIZES = tuple(BACKBONE.pop('kernel_sizes'))
NAME = 'slak_tiny_120e'


@pytest.fixture
def server():
    with file_server.running() as server:
        server.files['/download'] = OFFICIAL.read_bytes()
        yield server


@pytest.fixture
def entry(server, monkeypatch) -> Released:
    """An entry of the table for the small model of the golden files, at our server."""
    entry = dataclasses.replace(
        RELEASED[NAME],
        link=server.url('download'),
        backbone=BACKBONE,
        kernel_size=KERNEL_SIZES[0],
    )
    monkeypatch.setitem(RELEASED, NAME, entry)
    return entry


def files_below(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob('*') if p.is_file()}


# ---------------------------------------------------------------- one classifier, to the end


def test_fetch_convert_and_say_what_to_set(entry, server, tmp_path, capsys):
    command = [NAME, '--out', str(tmp_path)]
    assert get_checkpoint.main(command) == 0
    said = capsys.readouterr().out
    clean = tmp_path / entry.file
    assert f"set in a config: checkpoint = '{clean}'" in said
    config = f'mmslak::{Path(entry.config).stem}'
    assert f'mmslak train {config} --cfg-options checkpoint={clean}' in said
    assert files_below(tmp_path) == {entry.file}
    state, expected = read_state_dict(clean), convert(OFFICIAL)
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in state)
    assert get_checkpoint.main(command) == 0  # it is there already
    assert said.splitlines()[-3:] == capsys.readouterr().out.splitlines()[-3:]
    assert server.asked == [None]


def test_a_broken_connection_is_taken_up(entry, server, tmp_path, monkeypatch):
    monkeypatch.setattr('mmslak.fileio.download.WAIT', 0.0)
    server.faults = [5000]
    assert get_checkpoint.main([NAME, '--out', str(tmp_path)]) == 0
    assert server.asked == [None, 'bytes=5000-']


def test_a_file_that_was_downloaded_by_hand(entry, server, tmp_path):
    shutil.copy(OFFICIAL, tmp_path / 'by_hand.pth')
    command = [NAME, '--out', str(tmp_path / 'out'), '--file', str(tmp_path / 'by_hand.pth')]
    assert get_checkpoint.main(command) == 0
    assert files_below(tmp_path) == {'by_hand.pth', f'out/{entry.file}'}
    assert server.asked == []


def test_other_kernels_than_the_configs_have_are_told(tmp_path, monkeypatch, capsys):
    kernel_sizes = (31, 29, 27, 13)
    entry = dataclasses.replace(RELEASED['slak_tiny_120e_k31'], backbone=BACKBONE)
    monkeypatch.setitem(RELEASED, 'slak_tiny_120e_k31', entry)
    model = SLaK(**BACKBONE, kernel_sizes=kernel_sizes)
    torch.save(dict(model=model.state_dict()), tmp_path / 'k31.pth')
    command = ['slak_tiny_120e_k31', '--out', str(tmp_path), '--file', str(tmp_path / 'k31.pth')]
    assert get_checkpoint.main(command) == 0
    assert 'model.backbone.kernel_sizes=31,29,27,13\n' in capsys.readouterr().out


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (dict(kernel_size=61), 'has 61 in the first of four'),
        (dict(backbone=dict(BACKBONE, width_factor=2.0)), 'another architecture'),
        (dict(head='decode_head.'), 'is a segmentor, this is a classifier'),
    ],
)
def test_another_model_than_the_name_says_is_refused(
    entry, tmp_path, monkeypatch, change, message, capsys
):
    monkeypatch.setitem(RELEASED, NAME, dataclasses.replace(entry, **change))
    assert get_checkpoint.main([NAME, '--out', str(tmp_path)]) == 2
    assert message in capsys.readouterr().err
    assert files_below(tmp_path) == {f'{NAME}.released.corrupt'}


def test_a_damaged_file_is_refused_and_a_retry_starts_anew(entry, server, tmp_path, capsys):
    whole = server.files['/download']
    server.files['/download'] = whole[: len(whole) // 2]
    command = [NAME, '--out', str(tmp_path)]
    assert get_checkpoint.main(command) == 2
    assert 'truncated, damaged or not a checkpoint' in capsys.readouterr().err
    server.files['/download'] = whole
    assert get_checkpoint.main(command) == 0
    assert server.asked == [None, None]


@pytest.mark.parametrize('page', [True, False])
def test_a_dead_link_tells_the_other_way(entry, server, tmp_path, page, capsys):
    if page:
        server.content_type = 'text/html'
    else:
        server.files.clear()
    out = tmp_path / 'out'
    assert get_checkpoint.main([NAME, '--out', str(out)]) == 2
    assert not out.exists()
    out.mkdir()
    capsys.readouterr()
    assert get_checkpoint.main([NAME, '--out', str(out)]) == 2
    assert out.is_dir()  # it was there before
    error = capsys.readouterr().err
    assert ('a web page came' if page else '404') in error
    by_hand = f'mmslak get-checkpoint {NAME} --out {out} --file FILE'
    assert f'or get {entry.link} with a browser and run {by_hand}' in error


def test_google_drive_goes_through_gdown(entry, server, tmp_path, monkeypatch, capsys):
    link = 'https://drive.google.com/file/d/THE_ID'
    monkeypatch.setitem(RELEASED, NAME, dataclasses.replace(entry, link=link))
    command = [NAME, '--out', str(tmp_path)]
    monkeypatch.setitem(sys.modules, 'gdown', None)
    assert get_checkpoint.main(command) == 2
    assert 'pip install gdown' in capsys.readouterr().err

    def gdown_download(*, id: str, output: str, **options) -> None:
        assert id == 'THE_ID'
        shutil.copy(OFFICIAL, output)

    monkeypatch.setitem(sys.modules, 'gdown', types.SimpleNamespace(download=gdown_download))
    assert get_checkpoint.main(command) == 0
    assert server.asked == []


# ---------------------------------------------------------------- the table


def test_the_table_has_what_the_configs_start_from():
    files = {entry.file for entry in RELEASED.values()}
    wanted = set()
    for path in [*ROOT.glob('configs/*.py')]:
        wanted |= set(re.findall(r'checkpoints/([\w.]*in1k\.pth)', path.read_text()))
    assert 'slak_tiny_in1k.pth' in wanted
    # PeLK's authors have released no weights, and nobody compact ones: these configs start from
    # one's own pre-training.
    own = {file for file in wanted if file.startswith('pelk_') or '_compact_' in file}
    assert wanted - own <= files
    assert not any(file.startswith('pelk_') for file in files)


@functools.cache
def config(path: str) -> Config:
    return Config.fromfile(ROOT / path)


@pytest.mark.parametrize('name', RELEASED)
def test_an_entry_fits_its_config(name):
    entry = RELEASED[name]
    cfg = config(entry.config)
    assert cfg.model.get('student', cfg.model).backbone.arch == entry.backbone['arch']
    if not entry.head and entry.kernel_size == 51:
        assert cfg.checkpoint == f'checkpoints/{entry.file}'
    if entry.google_drive_id:
        assert re.fullmatch(r'[\w-]{33}', entry.google_drive_id)


@pytest.mark.parametrize(
    ('file', 'command'),
    [
        (
            'checkpoints/slak_tiny_in1k.pth',
            'mmslak get-checkpoint slak_tiny (released at https://drive.',
        ),
        (
            '/w/slak_base_in1k.pth',
            'mmslak get-checkpoint slak_base --out /w (released at https://drive.',
        ),
        ('checkpoints/mine.pth', 'put them there'),
    ],
)
def test_training_without_the_weights_names_the_command(tmp_path, monkeypatch, file, command):
    monkeypatch.chdir(tmp_path)
    pretrained = dict(type='Pretrained', checkpoint=file)
    cfg = Config(dict(model=dict(backbone=dict(type='mmslak.SLaK', init_cfg=pretrained))))
    with pytest.raises(UserError, match=f'{file} not found .*{re.escape(command)}'):
        check_pretrained(cfg)


# ---------------------------------------------------------------- ConvNeXt that learnt from SLaK


@pytest.fixture(scope='module')
def convnext() -> tuple[dict, torch.Tensor, torch.Tensor]:
    """ConvNeXt-T as SLaK's code has it, with statistics, a picture and its logits."""
    generator = torch.Generator().manual_seed(0)
    options = dict(kernel_sizes=(7, 7, 7, 7), small_kernel=None, decomposed=False)
    backbone = SLaK(
        width_factor=1.0,
        layer_scale_init_value=0.1,
        out_indices=3,
        gap_before_final_norm=True,
        **options,
    )
    with torch.no_grad():
        for name, tensor in backbone.state_dict().items():
            if '.bn.' in name and tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    head = nn.Linear(768, 1000)
    picture = torch.randn(1, 3, 64, 64, generator=generator)
    with torch.no_grad():
        logits = head(backbone.eval()(picture)[0])
    state = {k.replace('.square.', '.lkb_origin.'): v for k, v in backbone.state_dict().items()}
    state = {re.sub(r'^norm3\.', 'norm.', name): v for name, v in state.items()}
    return state | {f'head.{k}': v for k, v in head.state_dict().items()}, picture, logits


def in_names_of_convnext(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Official ConvNeXt, which has a bias in the place of batch norms."""
    plain = {k.replace('large_kernel.lkb_origin.conv', 'dwconv'): v for k, v in state.items()}
    biases = {k.replace('large_kernel.lkb_origin.bn', 'dwconv'): v for k, v in state.items()
              if k.endswith('.bn.bias')}  # fmt: skip
    return {k: v for k, v in plain.items() if '.bn.' not in k} | biases


def get_convnext(state: dict, folder: Path, name: str = 'convnext_tiny_l2s') -> int:
    torch.save(dict(model=state, epoch=299), folder / 'file.pth')
    return get_checkpoint.main([name, '--out', str(folder), '--file', str(folder / 'file.pth')])


def distilled_student() -> nn.Module:
    cfg = read_model_config(ROOT / 'configs/convnext_t_l2s_slak_t_imagenet.py')
    return build(cfg).eval()


def test_convnext_with_norms_gives_the_same_logits(convnext, tmp_path, capsys):
    state, picture, logits = convnext
    assert get_convnext(state, tmp_path) == 0
    clean = tmp_path / 'convnext_tiny_l2s_in1k.pth'
    command = f'mmslak test mmslak::convnext_t_l2s_slak_t_imagenet {clean}'
    assert f'test it: {command}\n' in capsys.readouterr().out
    model = distilled_student()
    model.load_state_dict(read_state_dict(clean), strict=True)
    with torch.no_grad():
        torch.testing.assert_close(model(picture), logits, rtol=1e-4, atol=1e-5)


def test_convnext_in_its_official_names(convnext, tmp_path):
    state = in_names_of_convnext(convnext[0])
    assert get_convnext(state, tmp_path) == 0
    model = distilled_student()
    clean = read_state_dict(tmp_path / 'convnext_tiny_l2s_in1k.pth')
    model.load_state_dict(clean, strict=True)
    assert len(clean) == len(state)
    loaded = model.backbone.stages[2][8]
    for theirs, ours in (
        ('dwconv', loaded.depthwise_conv),
        ('norm', loaded.norm),
        ('pwconv1', loaded.pointwise_conv1),
        ('pwconv2', loaded.pointwise_conv2),
    ):
        for kind in ('weight', 'bias'):
            assert torch.equal(getattr(ours, kind), state[f'stages.2.8.{theirs}.{kind}'])
    assert torch.equal(loaded.gamma, state['stages.2.8.gamma'])
    assert torch.equal(model.backbone.norm3.bias, state['norm.bias'])
    assert torch.equal(model.head.fc.weight, state['head.weight'])


@pytest.mark.parametrize('norms', [True, False])
def test_another_convnext_is_refused(convnext, tmp_path, norms, capsys):
    state = convnext[0] if norms else in_names_of_convnext(convnext[0])
    assert get_convnext(state, tmp_path, 'convnext_small_l2s') == 2
    lacking = {name: v for name, v in state.items() if not name.startswith('stages.3.2.pwconv1')}
    assert get_convnext(lacking, tmp_path) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2
    for error in errors:
        assert error.startswith(f'error: {tmp_path / "file.pth"}: ')
    assert files_below(tmp_path) == {'file.pth'}


# ---------------------------------------------------------------- mmseg 0.x and mmdet 2.x

NORM = ('weight', 'bias', 'running_mean', 'running_var', 'num_batches_tracked')


def with_norm(*names: str) -> list[str]:
    """Names of ConvModules with a batch norm."""
    ends = ('conv.weight', *(f'bn.{name}' for name in NORM))
    return [f'{name}.{end}' for name in names for end in ends]


def with_bias(*names: str) -> list[str]:
    return [f'{name}.{end}' for name in names for end in ('weight', 'bias')]


def upernet_heads_of_mmseg_0() -> list[str]:
    """As UPerHead and FCNHead of mmsegmentation 0.x name them."""
    return [
        *with_bias('decode_head.conv_seg', 'auxiliary_head.conv_seg'),
        *with_norm(*(f'decode_head.psp_modules.{i}.1' for i in range(4))),
        *with_norm('decode_head.bottleneck', 'decode_head.fpn_bottleneck'),
        *with_norm(*(f'decode_head.lateral_convs.{i}' for i in range(3))),
        *with_norm(*(f'decode_head.fpn_convs.{i}' for i in range(3))),
        *with_norm('auxiliary_head.convs.0'),
    ]


def cascade_heads_of_mmdet_2() -> list[str]:
    """As FPN, RPNHead, ConvFCBBoxHead (4conv1fc) and FCNMaskHead of mmdetection 2.x name them."""
    names = [
        *with_bias(
            *(f'neck.{kind}_convs.{i}.conv' for kind in ('lateral', 'fpn') for i in range(4))
        ),
        *with_bias('rpn_head.rpn_conv', 'rpn_head.rpn_cls', 'rpn_head.rpn_reg'),
    ]
    for stage in range(3):
        box, mask = f'roi_head.bbox_head.{stage}', f'roi_head.mask_head.{stage}'
        names += with_norm(*(f'{box}.shared_convs.{i}' for i in range(4)))
        names += with_bias(f'{box}.shared_fcs.0', f'{box}.fc_cls', f'{box}.fc_reg')
        names += with_bias(*(f'{mask}.convs.{i}.conv' for i in range(4)))
        names += with_bias(f'{mask}.upsample', f'{mask}.conv_logits')
    return names


def small_upernet(tmp_path: Path) -> nn.Module:
    cfg = Config.fromfile(ROOT / 'configs/upernet_slak_t_ade20k.py')
    channels = shrink_backbone(cfg)
    cfg.model.decode_head.update(in_channels=channels, channels=16)
    cfg.model.auxiliary_head.update(in_channels=channels[2], channels=8)
    return build(cfg)


def small_cascade(tmp_path: Path) -> nn.Module:
    cfg = Config.fromfile(ROOT / 'configs/cascade_mask_rcnn_slak_t_coco_1x.py')
    model = cfg.model
    model.neck.update(in_channels=shrink_backbone(cfg), out_channels=16)
    model.rpn_head.update(in_channels=16, feat_channels=16)
    for extractor in (model.roi_head.bbox_roi_extractor, model.roi_head.mask_roi_extractor):
        extractor.out_channels = 16
    for head in model.roi_head.bbox_head:
        head.update(in_channels=16, conv_out_channels=16, fc_out_channels=32)
    model.roi_head.mask_head.update(in_channels=16, conv_out_channels=16)
    return build(cfg)


def shrink_backbone(cfg: Config) -> list[int]:
    cfg.model.backbone.update(width_factor=0.1, kernel_sizes=(13, 11, 9, 7), init_cfg=None)
    return [9, 19, 38, 76]


def build(cfg: Config) -> nn.Module:
    init_default_scope(cfg.default_scope)
    return MODELS.build(cfg.model)


def old_checkpoint(model: nn.Module, heads: list[str]) -> dict:
    """A file as the old frameworks wrote it, with random weights for a model of ours."""
    generator = torch.Generator().manual_seed(0)
    ours = model.state_dict()
    official = {v: k for k, v in OFFICIAL_BRANCHES.items()}
    state = OrderedDict()
    for name in ours:
        if name.startswith('backbone.'):
            old = re.sub(r'(?<=large_kernel\.)\w+', lambda match: official[match[0]], name)
            state[old] = ours[name]
    assert 'backbone.stages.0.0.large_kernel.LoRA1.conv.weight' in state
    assert 'backbone.norm3.weight' in state
    state.update({name: ours[name] for name in heads})  # a name that ours lacks is a KeyError
    state = {
        name: torch.rand(tensor.shape, generator=generator)
        if tensor.is_floating_point()
        else torch.tensor(160000)
        for name, tensor in state.items()
    }
    state['ema_backbone_norm0_weight'] = torch.zeros(9)
    meta = dict(
        mmseg_version='0.29.1+f67ef9c', CLASSES=('wall', 'sky'), PALETTE=[[120, 120, 120]],
        env_info='sys.platform: linux', config='model = dict()', seed=0, iter=160000, epoch=10,
        hook_msgs={}, time='Sun Nov  6 10:11:12 2022', args=argparse.Namespace(seed=0),
    )  # fmt: skip
    optimizer = dict(state={0: dict(step=1, exp_avg=torch.zeros(3))}, param_groups=[dict(lr=1e-4)])
    return dict(meta=meta, state_dict=OrderedDict(state), optimizer=optimizer)


@pytest.mark.parametrize(
    ('name', 'small', 'heads'),
    [
        ('upernet_slak_tiny', small_upernet, upernet_heads_of_mmseg_0()),
        ('cascade_slak_tiny_1x', small_cascade, cascade_heads_of_mmdet_2()),
    ],
)
def test_a_model_of_the_old_frameworks_loads_with_every_weight_matched(
    server, tmp_path, name, small, heads, monkeypatch, capsys
):
    model = small(tmp_path)
    old = old_checkpoint(model, heads)
    torch.save(old, tmp_path / 'old.pth')
    server.files['/download'] = (tmp_path / 'old.pth').read_bytes()
    entry = dataclasses.replace(
        RELEASED[name],
        link=server.url('download'),
        backbone=dict(arch='tiny', width_factor=0.1),
        kernel_size=13,
    )
    monkeypatch.setitem(RELEASED, name, entry)
    out = tmp_path / 'out put'
    assert get_checkpoint.main([name, '--out', str(out)]) == 0
    clean = out / entry.file
    assert f"mmslak test mmslak::{Path(entry.config).stem} '{clean}'\n" in capsys.readouterr().out

    state = torch.load(clean, weights_only=True)['state_dict']
    assert state.keys() == model.state_dict().keys()
    model.load_state_dict(state, strict=True)
    loaded = model.state_dict()
    official = re.compile('|'.join(OFFICIAL_BRANCHES))
    for theirs, tensor in old['state_dict'].items():
        ours = official.sub(lambda match: OFFICIAL_BRANCHES[match[0]], theirs)
        assert theirs.startswith('ema_') or torch.equal(loaded[ours], tensor), theirs
    assert len(loaded) == len(old['state_dict']) - len(['ema_backbone_norm0_weight'])


@pytest.mark.parametrize(
    ('name', 'heads', 'is_a'),
    [
        ('upernet_slak_tiny', cascade_heads_of_mmdet_2(), 'a segmentor, this is a detector'),
        ('cascade_slak_tiny_1x', upernet_heads_of_mmseg_0(), 'a detector, this is a segmentor'),
    ],
)
def test_a_model_with_another_head_is_refused(tmp_path, name, heads, is_a, capsys):
    state = read_state_dict(OFFICIAL)
    state = {f'backbone.{name}': state[name] for name in state} | {n: torch.ones(1) for n in heads}
    torch.save(dict(state_dict=state), tmp_path / 'file.pth')
    entry = dataclasses.replace(RELEASED[name], backbone=BACKBONE, kernel_size=KERNEL_SIZES[0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(RELEASED, name, entry)
        command = [name, '--file', str(tmp_path / 'file.pth'), '--out', str(tmp_path / 'out')]
        assert get_checkpoint.main(command) == 2
    assert f'{entry.file} is {is_a}' in capsys.readouterr().err
    assert not (tmp_path / 'out').exists() or files_below(tmp_path / 'out') == set()


def test_no_two_names_have_one_file_or_link():
    assert len({entry.file for entry in RELEASED.values()}) == len(RELEASED)
    assert len({entry.link for entry in RELEASED.values()}) == len(RELEASED)


def test_a_backbone_takes_its_weights_from_a_whole_old_model(tmp_path):
    model = small_upernet(tmp_path)
    torch.save(old_checkpoint(model, upernet_heads_of_mmseg_0()), tmp_path / 'old.pth')
    backbone = SLaK(
        width_factor=0.1,
        kernel_sizes=(13, 11, 9, 7),
        init_cfg=dict(type='Pretrained', checkpoint=str(tmp_path / 'old.pth')),
    )
    backbone.init_weights()
    expected = convert(tmp_path / 'old.pth')
    for name, tensor in backbone.state_dict().items():
        assert torch.equal(tensor, expected[f'backbone.{name}']), name
