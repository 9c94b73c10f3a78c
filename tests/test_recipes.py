"""Recipes to the letter, and every shipped config end to end on miniatures.

More about the tools themselves, with segmentation, is in cli/test_train_and_test.py.
"""

import math
import pickle
import re
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.optim import CosineAnnealingLR, build_optim_wrapper
from mmengine.registry import DATASETS, MODELS, init_default_scope

import mmslak  # noqa: F401
from mmslak.apis.options import apply_options
from mmslak.checkpoints.files import read_state_dict
from mmslak.cli import convert_checkpoint, runner
from mmslak.cli.options_action import OptionsAction
from mmslak.cli.runner import enable_tta
from mmslak.datasets import make_digit_scenes
from mmslak.errors import UserError
from tests import miniatures
from tests.cli.test_train_and_test import SMALL, evaluate_tool, load_main, train_tool
from tests.golden import GOLDEN, ROOT

check_tool = load_main('check_dataset')
SUFFIXES = ('.jpg', '.png')
# The shipped configs at the size of the miniatures. What follows is options alone: pictures are
# resized, cropped and padded as the configs say, to 64 to 256 pixels where they say 400 to 2048.
RUN = [
    'env_cfg.cudnn_benchmark=False',
    'default_hooks.logger.interval=1',
    'randomness.seed=0',
    'train_dataloader.num_workers=0',
    'val_dataloader.num_workers=0',
    'test_dataloader.num_workers=0',
]
BACKBONE = [
    'model.backbone.init_cfg=None',
    'model.backbone.width_factor=0.1',
    'model.backbone.kernel_sizes=13,11,9,7',
]
NECK = ['model.neck.in_channels=9,19,38,76']
DETECTOR = [
    *RUN,
    'model.neck.out_channels=16',
    'model.rpn_head.in_channels=16',
    'model.rpn_head.feat_channels=16',
    'model.roi_head.bbox_roi_extractor.out_channels=16',
    'model.train_cfg.rpn_proposal.max_per_img=100',
    'model.test_cfg.rpn.max_per_img=50',
    'model.test_cfg.rcnn.max_per_img=10',  # untrained, each picture would have its 100
    'train_cfg.max_epochs=1',
    'train_dataloader.batch_size=4',
    'val_dataloader.dataset.pipeline.1.scale=(128,96)',
    'test_dataloader.dataset.pipeline.1.scale=(128,96)',
]
FASTER = [
    *DETECTOR,
    'model.roi_head.bbox_head.in_channels=16',
    'model.roi_head.bbox_head.fc_out_channels=32',
    'model.train_cfg.rcnn.sampler.num=64',
]
VOC_SCALES = 'scales=[(64,128),(96,128)]'
VOC = [*FASTER, f'train_dataloader.dataset.pipeline.2.{VOC_SCALES}']
VOC_0712 = [
    *FASTER,
    *(f'train_dataloader.dataset.datasets.{i}.pipeline.2.{VOC_SCALES}' for i in (0, 1)),
]
CHOICE = 'train_dataloader.dataset.pipeline.3.transforms'
CASCADE = [
    *DETECTOR,
    'model.test_cfg.rcnn.score_thr=0.0',  # untrained scores are about 1 in 81
    *(
        f'model.roi_head.bbox_head.{i}.{key}'
        for i in range(3)
        for key in ('in_channels=16', 'conv_out_channels=16', 'fc_out_channels=32')
    ),
    *(f'model.train_cfg.rcnn.{i}.sampler.num=64' for i in range(3)),
    'model.roi_head.mask_roi_extractor.out_channels=16',
    'model.roi_head.mask_head.in_channels=16',
    'model.roi_head.mask_head.conv_out_channels=16',
    f'{CHOICE}.1.0.scales=[(48,128),(72,128)]',
    f'{CHOICE}.1.1.crop_size=(48,64)',
    'train_dataloader.dataset.pipeline.4.scales=[(64,128),(96,128)]',
]
SEGMENTOR = [
    *(option for option in SMALL if not re.match(r'model\.backbone|.*\.in_channels=', option)),
    'train_dataloader.batch_size=4',
]
CLASSIFIER = [
    *RUN,
    'train_dataloader.dataset.pipeline.1.scale=64',
    'val_dataloader.dataset.pipeline.1.scale=72',
    'test_dataloader.dataset.pipeline.1.scale=72',
    'val_dataloader.dataset.pipeline.2.crop_size=64',
    'test_dataloader.dataset.pipeline.2.crop_size=64',
    'train_dataloader.batch_size=6',  # of four, drop path may leave none in a block
    'train_cfg.max_epochs=1',
    'train_cfg.val_interval=1',
    'param_scheduler.1.begin=0',
    'default_hooks.checkpoint.interval=1',
]
CLASSIFIER_384 = [
    *(option for option in CLASSIFIER if '.crop_size=' not in option and 'param_' not in option),
    'param_scheduler.0.end=1',
]
COCO_ANNOTATIONS = [
    f'{split}_evaluator.ann_file={{root}}/annotations/instances_val2017.json'
    for split in ('val', 'test')
]
# Backbones with 8, 16, 32 and 64 channels and a block in each stage, which no option can make of
# an `arch` that is a name.
LARGE_KERNEL = dict(
    arch=dict(_delete_=True, depths=[1, 1, 1, 1], dims=[8, 16, 32, 64]), width_factor=1.0
)
ARCHITECTURES = dict(
    slak=LARGE_KERNEL,
    pelk=LARGE_KERNEL,
    convnext=dict(arch=dict(_delete_=True, depths=[1, 1, 1, 1], channels=[8, 16, 32, 64])),
    swin=dict(arch=dict(_delete_=True, embed_dims=8, depths=[1, 1, 1, 1], num_heads=[1, 2, 2, 4])),
    replknet=dict(
        arch=dict(
            _delete_=True,
            large_kernel_sizes=[13, 11, 9, 7],
            layers=[1, 1, 1, 1],
            channels=[8, 16, 32, 64],
            small_kernel=5,
            dw_ratio=1,
        )
    ),
)
HEADS = dict(
    upernet=dict(
        decode_head=dict(in_channels=[8, 16, 32, 64]), auxiliary_head=dict(in_channels=32)
    ),
    faster=dict(neck=dict(in_channels=[8, 16, 32, 64])),
    cascade=dict(neck=dict(in_channels=[8, 16, 32, 64])),
    imagenet=dict(head=dict(in_channels=64)),
)
CONVNEXT = "_base_ = ['mmpretrain::convnext/convnext-{}_32xb128_in1k.py']"
# These have tests of their own below, with options alone.
IN_DETAIL = {
    'faster_rcnn_slak_t_voc07',
    'cascade_mask_rcnn_slak_t_coco',
    'slak_t_imagenet',
}
FILES = [path.relative_to(ROOT / 'configs') for path in (ROOT / 'configs').rglob('*.py')]
# The demos are run in test_demo.py and test_demo_detection.py.
SHIPPED = sorted(
    str(path.with_suffix('')) for path in FILES if path.parts[0] not in ('_base_', 'demo')
)
SCORES = dict(
    upernet=['mIoU'],
    faster=['pascal_voc/mAP'],
    cascade=['coco/bbox_mAP', 'coco/segm_mAP'],
    imagenet=['accuracy/top1', 'accuracy/top5'],
)


@pytest.fixture(autouse=True)
def in_repository(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(runner, 'get_device', lambda: 'cpu')
    monkeypatch.setenv('LOCAL_RANK', '0')


@pytest.fixture(scope='module')
def data(tmp_path_factory) -> Path:
    """All miniatures, with pictures as in the field."""
    root = tmp_path_factory.mktemp('data')
    miniatures.write_ade20k(root / 'ade', train=6, val=4)
    miniatures.write_voc(root / 'VOCdevkit', 2007)
    miniatures.write_voc(root / 'VOCdevkit', 2012)
    miniatures.write_coco(root / 'coco', train=9, val=6)
    miniatures.write_imagenet(root / 'imagenet', count=4)
    return root


def load(name: str) -> Config:
    return Config.fromfile(ROOT / f'configs/{name}.py')


def task_of(name: str) -> str:
    """The key of a config in HEADS and SCORES."""
    return next((task for task in HEADS if name.startswith(task)), 'imagenet')


def options_of(name: str, data: Path) -> list[str]:
    """What makes a shipped config small, but for its backbone and what takes that's channels."""
    task = task_of(name)
    if task == 'upernet':
        student = [re.sub('^model', 'model.student', option) for option in SEGMENTOR]
        return [f'data_root={data}/ade', *(student if '_l2s_' in name else SEGMENTOR)]
    if task == 'faster':
        return [f'data_root={data}/VOCdevkit/', *(VOC_0712 if name.endswith('0712') else VOC)]
    if task == 'cascade':
        root = data / 'coco'
        annotations = [option.format(root=root) for option in COCO_ANNOTATIONS]
        return [f'data_root={root}/', *CASCADE, *annotations]
    roots = [f'{s}_dataloader.dataset.data_root={data}/imagenet' for s in ('train', 'val', 'test')]
    if name.endswith('_384'):
        return [*roots, *CLASSIFIER_384]
    sparse = 'custom_hooks.1.update_interval=1'
    return [*roots, *CLASSIFIER, *([] if name.endswith('dense') or '_l2s_' in name else [sparse])]


def write_small(name: str, folder: Path) -> Path:
    """A config that is a shipped one with another architecture."""
    learner, _, teacher = name.partition('_l2s_')
    (family,) = (family for family in ARCHITECTURES if family in learner)
    backbone = dict(ARCHITECTURES[family], init_cfg=None)
    if '_compact_' in name:
        backbone['hidden_channels'] = [[5], [10], [19], [39]]
    model = dict(backbone=backbone, **HEADS[task_of(name)])
    if name.endswith('_384'):
        model['head'] = dict(model['head'], init_cfg=None)
    if teacher:
        model = dict(student=model, **write_teacher(load(name).model.teacher[8:], folder))
    path = folder / 'config.py'
    path.write_text(f'_base_ = [{str(ROOT / f"configs/{name}.py")!r}]\nmodel = {model}\n')
    return path


def write_teacher(name: str, folder: Path) -> dict[str, str]:
    """A small form of a shipped config and weights of it, as arguments of a distilled model."""
    (folder / 'teacher').mkdir()
    config, weights = write_small(name, folder / 'teacher'), folder / 'teacher.pth'
    cfg = Config.fromfile(config)
    init_default_scope(cfg.default_scope)
    torch.save(dict(state_dict=MODELS.build(cfg.model).state_dict()), weights)
    return dict(teacher=str(config), teacher_checkpoint=str(weights))


def train_and_test(
    config: str, options: list[str], work_dir: Path, capsys, *flags: str, rehearses: bool = True
) -> str:
    """Trains for a few iterations and a validation, tests, returns what tools/test.py printed."""
    options, rehearsal = ['--cfg-options', *options], [] if rehearses else ['--no-rehearsal']
    assert train_tool([config, '--work-dir', str(work_dir), *rehearsal, *options]) == 0
    log = next(work_dir.glob('*/*.log')).read_text()
    assert re.search(r'(Epoch\(train\) +\[1\]|Iter\(train\) )\[ *2/ *\d+\].* loss: \d', log)
    assert re.search(r'(Epoch\(val\) +\[1\]|Iter\(val\) )\[\d/\d\] .*: -?\d', log)
    (checkpoint,) = work_dir.glob('*_[0-9].pth')
    capsys.readouterr()
    arguments = [config, str(checkpoint), '--work-dir', str(work_dir / 'test'), *flags, *options]
    assert evaluate_tool(arguments) == 0
    return capsys.readouterr().out


def pickled(path: Path) -> list:
    with path.open('rb') as file:
        return pickle.load(file)


# ---------------------------------------------------------------- end to end


@pytest.mark.parametrize('name', [name for name in SHIPPED if name not in IN_DETAIL])
def test_every_config_trains_validates_and_tests(name, data, tmp_path, capsys):
    """Through its own pipelines, on pictures as in the field.

    Without a rehearsal, which would be the validation once more; those of `IN_DETAIL` have it.
    """
    config, options = str(write_small(name, tmp_path)), options_of(name, data)
    printed = train_and_test(config, options, tmp_path / 'work', capsys, rehearses=False)
    for score in SCORES[task_of(name)]:
        assert re.search(rf'^{score}: -?[\d.]+$', printed, re.MULTILINE)


@pytest.mark.parametrize('split', ['train', 'val', 'test'])
@pytest.mark.parametrize(
    'name',
    [
        'upernet_slak_t_ade20k',
        'faster_rcnn_slak_t_voc07',
        'faster_rcnn_slak_t_voc0712',
        'cascade_mask_rcnn_slak_t_coco',
        'slak_t_imagenet',
    ],
)
def test_pictures_are_resized(name, data, split):
    """Some are made larger and some smaller, upright ones and others; labels stay as they are."""
    cfg = load(name)
    pairs = [option.split('=', 1) for option in options_of(name, data)]
    parse = OptionsAction._parse_iterable
    apply_options(cfg, {key: parse(value) for key, value in pairs})
    init_default_scope(cfg.default_scope)
    larger, smaller, upright = 0, 0, 0
    dataset = DATASETS.build(cfg[f'{split}_dataloader'].dataset)
    for sample in dataset:
        packed = sample['data_samples']
        before, after = packed.ori_shape, packed.img_shape
        assert before != after
        larger += after[0] * after[1] > before[0] * before[1]
        smaller += after[0] * after[1] < before[0] * before[1]
        upright += before[0] > before[1]
        if split != 'train' and 'gt_sem_seg' in packed:
            assert packed.gt_sem_seg.data.shape[1:] == before
    assert min(larger, smaller, upright) > 0
    assert upright < len(dataset)


@pytest.mark.parametrize(
    ('name', 'odd'),
    [
        ('upernet_slak_t_ade20k', {'grey', 'CMYK', 'EXIF'}),
        ('faster_rcnn_slak_t_voc0712', {'grey', 'CMYK', 'EXIF', 'beyond'}),
        ('cascade_mask_rcnn_slak_t_coco', {'grey', 'CMYK', 'EXIF', 'beyond', 'alpha', '8 bits'}),
        ('slak_t_imagenet', {'grey', 'CMYK', 'EXIF'}),
    ],
)
def test_data_as_in_the_field_are_odd_at_most(name, odd, data, capsys):
    argv = [f'configs/{name}.py', '--workers', '1', '--split', 'train', 'val', 'test']
    assert check_tool([*argv, '--cfg-options', *options_of(name, data)]) == 0
    printed = capsys.readouterr().out
    assert len(re.findall('samples, 0 bad$', printed, re.MULTILINE)) == 3
    assert all(kind in printed for kind in odd)


def test_voc07(data, tmp_path, capsys):
    config = 'configs/faster_rcnn_slak_t_voc07.py'
    options = [*options_of('faster_rcnn_slak_t_voc07', data), *BACKBONE, *NECK]
    flags = ['--out', str(tmp_path / 'out.pkl'), '--show-dir', str(tmp_path / 'pictures')]
    printed = train_and_test(config, options, tmp_path / 'work', capsys, *flags)
    assert re.search(r'^pascal_voc/mAP: [\d.]+$', printed, re.MULTILINE)
    assert len(pickled(tmp_path / 'out.pkl')) == 3
    assert len(list((tmp_path / 'pictures').rglob('*.jpg'))) == 3

    arguments = [config, str(tmp_path / 'work/epoch_1.pth'), '--work-dir', str(tmp_path / 'tta')]
    assert evaluate_tool([*arguments, '--tta', '--cfg-options', *options]) == 0
    assert re.search(r'^pascal_voc/mAP: [\d.]+$', capsys.readouterr().out, re.MULTILINE)


def test_coco(data, tmp_path, capsys):
    config = 'configs/cascade_mask_rcnn_slak_t_coco.py'
    options = [*options_of('cascade_mask_rcnn_slak_t_coco', data), *BACKBONE, *NECK]
    flags = ['--out', str(tmp_path / 'out.pkl'), '--show-dir', str(tmp_path / 'pictures')]
    printed = train_and_test(config, options, tmp_path / 'work', capsys, *flags)
    for kind in ('bbox', 'segm'):
        for score in ('mAP', 'mAP_50', 'mAP_75'):
            assert re.search(rf'^coco/{kind}_{score}: -?[\d.]+$', printed, re.MULTILINE)
        assert printed.count(f'{kind}_mAP: ') == 1  # and nobody else has printed it
    noise = ('index', 'DONE', 'Average Precision', 'copypaste', 'deprecated', 'alias')
    assert [word for word in noise if word in printed] == []
    logged = next((tmp_path / 'work/test').glob('*/*.log')).read_text()
    assert 'Average Precision' in logged
    assert re.search(r'Epoch\(test\) \[.*coco/bbox_mAP: ', logged)
    found = pickled(tmp_path / 'out.pkl')
    pictures = [path for path in (tmp_path / 'pictures').rglob('*') if path.suffix in SUFFIXES]
    assert len(found) == len(pictures) == 6
    assert all('masks' in sample['pred_instances'] for sample in found)

    # Of several views MMDetection merges boxes alone.
    arguments = [config, str(tmp_path / 'work/epoch_1.pth'), '--work-dir', str(tmp_path / 'tta')]
    assert evaluate_tool([*arguments, '--tta', '--cfg-options', *options]) == 0
    printed = capsys.readouterr().out
    assert '--tta: boxes alone, since' in printed
    assert re.search(r'^coco/bbox_mAP: -?[\d.]+$', printed, re.MULTILINE)
    assert 'coco/segm' not in printed


def test_tta_without_a_mask_head_to_leave_out():
    cfg = load('cascade_mask_rcnn_slak_t_coco')
    cfg.model = dict(type='CondInst', mask_head=dict(type='CondInstMaskHead'))
    with pytest.raises(UserError, match='--tta: MMDetection does not merge masks'):
        enable_tta(cfg)


def test_imagenet(data, tmp_path, capsys):
    config = 'configs/slak_t_imagenet.py'
    options = [*options_of('slak_t_imagenet', data), *BACKBONE, 'model.head.in_channels=76']
    flags = ['--out', str(tmp_path / 'out.pkl')]
    printed = train_and_test(config, options, tmp_path / 'work', capsys, *flags)
    for k in (1, 5):
        assert re.search(rf'^accuracy/top{k}: [\d.]+$', printed, re.MULTILINE)
    assert len(pickled(tmp_path / 'out.pkl')) == 12


def test_label_maps_with_a_palette(data, tmp_path, capsys):
    """A stock data set of the library, VOC's, with one of our backbones in its own config."""
    small = ARCHITECTURES['slak'] | dict(arch=dict(depths=[1, 1, 1, 1], dims=[8, 16, 32, 64]))
    model = dict(
        data_preprocessor=dict(size=(64, 64)),
        backbone=dict(_delete_=True, type='mmslak.SLaK', **small),
        decode_head=dict(in_channels=[8, 16, 32, 64], channels=16, num_classes=21),
        auxiliary_head=dict(in_channels=32, channels=8, num_classes=21),
    )
    bases = ['models/upernet_r50', 'datasets/pascal_voc12', 'default_runtime']
    bases = [f'mmseg::_base_/{base}.py' for base in [*bases, 'schedules/schedule_20k']]
    config = tmp_path / 'config.py'
    config.write_text(f'_base_ = {bases}\nmodel = dict(pretrained=None, **{model})\n')
    options = [option for option in SEGMENTOR if 'test_cfg' not in option and 'size=' not in option]
    options += ['train_dataloader.dataset.pipeline.3.crop_size=(64,64)']
    options += [f'data_root={data}/VOCdevkit/VOC2012', 'train_dataloader.batch_size=2']
    printed = train_and_test(str(config), options, tmp_path / 'work', capsys)
    assert re.search(r'^mIoU: [\d.]+$', printed, re.MULTILINE)


def test_a_released_classifier_is_evaluated_after_conversion(data, tmp_path, capsys):
    """The reference's file, through tools/convert_checkpoint.py, in tools/test.py."""
    from mmslak.cli import convert_checkpoint

    converted = str(tmp_path / 'converted.pth')
    assert convert_checkpoint.main([str(GOLDEN / 'slak_decomposed.pth'), converted]) == 0
    root = data / 'imagenet'
    config = tmp_path / 'config.py'
    config.write_text(
        f'_base_ = [{str(ROOT / "configs/slak_t_imagenet.py")!r}]\n'
        'model = dict(\n'
        '    backbone=dict(arch=dict(\n'
        '        _delete_=True, depths=[1, 1, 2, 1], dims=[8, 16, 24, 32])),\n'
        '    head=dict(num_classes=10, in_channels=41),\n'
        ')\n'
        'test_dataloader = dict(num_workers=0, dataset=dict(_delete_=True, type="CustomDataset",\n'
        f'    data_root={str(root)!r}, data_prefix="val", pipeline=_base_.test_pipeline,\n'
        '    metainfo=dict(classes=[str(i) for i in range(10)]), with_label=False))\n'
        'test_evaluator = dict(_delete_=True, type="DumpResults", out_file_path='
        f'{str(tmp_path / "out.pkl")!r})\n'
    )
    arguments = [str(config), converted, '--work-dir', str(tmp_path / 'work')]
    assert evaluate_tool(arguments) == 0, capsys.readouterr().err
    scores = [result['pred_score'] for result in pickled(tmp_path / 'out.pkl')]
    assert len(scores) == 12
    assert all(score.shape == (10,) for score in scores)


def test_the_demo_of_distillation(tmp_path, capsys):
    name, data, weights = 'demo/upernet_l2s_digit_scenes', tmp_path / 'data', tmp_path / 'w.pth'
    make_digit_scenes(data, train=6, test=2, size=80, train_digits=10, test_digits=10)
    cfg = load('demo/upernet_slak_digit_scenes')
    init_default_scope(cfg.default_scope)
    torch.save(dict(state_dict=MODELS.build(cfg.model).state_dict()), weights)
    options = [
        *(f'data_root={data}/ade', f'teacher_checkpoint={weights}'),
        *('train_cfg.max_iters=2', 'train_cfg.val_interval=2', 'default_hooks.logger.interval=1'),
        *('param_scheduler.0.end=1', 'param_scheduler.1.begin=1', 'param_scheduler.1.end=2'),
        *('default_hooks.checkpoint.interval=2', 'train_dataloader.batch_size=2'),
    ]
    printed = train_and_test(f'configs/{name}.py', options, tmp_path / 'work', capsys)
    assert re.search(r'^mIoU: [\d.]+$', printed, re.MULTILINE)
    log = next((tmp_path / 'work').glob('*/*.log')).read_text()
    assert re.search(r' loss_distillation: \d', log)


# ---------------------------------------------------------------- to the letter


@pytest.mark.parametrize(
    ('name', 'epochs', 'milestones', 'drop_path', 'channels'),
    [
        ('cascade_mask_rcnn_slak_t_coco', 36, [27, 33], 0.4, [124, 249, 499, 998]),
        ('cascade_mask_rcnn_slak_t_coco_1x', 12, [8, 11], 0.4, [124, 249, 499, 998]),
        ('cascade_mask_rcnn_slak_s_coco', 36, [27, 33], 0.4, [124, 249, 499, 998]),
        ('cascade_mask_rcnn_slak_b_coco', 36, [27, 33], 0.4, [166, 332, 665, 1331]),
    ],
)
def test_cascade_recipe(name, epochs, milestones, drop_path, channels):
    cfg = load(name)
    assert cfg.train_cfg.max_epochs == epochs
    assert cfg.param_scheduler[1].milestones == milestones
    assert cfg.model.backbone.drop_path_rate == drop_path
    assert cfg.model.neck.in_channels == channels
    optimizer = cfg.optim_wrapper.optimizer
    assert (optimizer.type, optimizer.lr, optimizer.weight_decay) == ('AdamW', 2e-4, 0.05)
    assert cfg.optim_wrapper.paramwise_cfg == dict(decay_type='layer_wise', decay_rate=0.7)
    assert cfg.train_dataloader.batch_size == 2
    assert cfg.auto_scale_lr.base_batch_size == 16
    assert [hook.preset for hook in cfg.custom_hooks] == ['finetune']
    *_, crops, last, _ = cfg.train_dataloader.dataset.pipeline
    whole, [first, crop] = crops.transforms
    assert whole == []
    sides = [[scale[0] for scale in resize.scales] for resize in (first, last)]
    assert sides == [[400, 500, 600], list(range(480, 801, 32))]
    assert {scale[1] for resize in (first, last) for scale in resize.scales} == {1333}
    assert (crop.crop_type, crop.crop_size) == ('absolute_range', (384, 600))
    heads = cfg.model.roi_head.bbox_head
    assert [head.bbox_coder.target_stds[0] for head in heads] == [0.1, 0.05, 0.033]
    for head in heads:
        assert (head.type, head.num_shared_convs, head.num_shared_fcs) == ('ConvFCBBoxHead', 4, 1)
        assert (head.loss_bbox.type, head.loss_bbox.loss_weight) == ('GIoULoss', 10.0)
        assert head.norm_cfg.type == 'SyncBN'


def test_the_three_heads_exist_once():
    files = (ROOT / 'configs').rglob('*.py')
    assert [p.name for p in files if '4conv1fc' in p.read_text()] == ['cascade_mask_rcnn_giou.py']


def test_voc_recipe():
    cfg = load('faster_rcnn_slak_t_voc07')
    assert cfg.train_dataloader.dataset.ann_file == 'VOC2007/ImageSets/Main/trainval.txt'
    assert cfg.test_dataloader.dataset.ann_file == 'VOC2007/ImageSets/Main/test.txt'
    assert cfg.train_dataloader.dataset.type == 'VOCDataset'  # each image once an epoch
    optimizer = cfg.optim_wrapper.optimizer
    assert (optimizer.type, optimizer.lr, optimizer.weight_decay) == ('AdamW', 1e-4, 0.05)
    assert cfg.train_cfg.max_epochs == 36
    assert cfg.auto_scale_lr.base_batch_size == 16
    scales = cfg.train_dataloader.dataset.pipeline[2].scales
    assert (min(scales)[0], max(scales)[0], {s[1] for s in scales}) == (480, 800, {1333})
    assert cfg.test_dataloader.dataset.pipeline[1].scale == (1333, 800)
    both = load('faster_rcnn_slak_t_voc0712').train_dataloader.dataset.datasets
    assert [d.data_prefix.sub_data_root for d in both] == ['VOC2007/', 'VOC2012/']


@pytest.mark.parametrize(
    ('name', 'epochs', 'drop_path', 'preset'),
    [
        ('slak_t_imagenet', 300, 0.1, 'slak_t'),
        ('slak_s_imagenet', 300, 0.4, 'slak_s'),
        ('slak_b_imagenet', 300, 0.5, 'slak_b'),
        ('slak_t_imagenet_120e', 120, 0.1, 'slak_t'),
        ('slak_t_neuron_imagenet', 300, 0.1, 'slak_t'),
    ],
)
def test_imagenet_recipe(name, epochs, drop_path, preset):
    cfg = load(name)
    assert cfg.train_cfg.max_epochs == epochs
    assert cfg.model.backbone.drop_path_rate == drop_path
    assert cfg.model.backbone.get('layer_scale_init_value', 1e-6) == 1e-6
    optimizer = cfg.optim_wrapper.optimizer
    assert (optimizer.type, optimizer.lr, optimizer.weight_decay) == ('AdamW', 4e-3, 0.05)
    assert cfg.auto_scale_lr.base_batch_size == 4096
    assert cfg.param_scheduler[0].end == cfg.param_scheduler[1].begin == 20
    assert 'end' not in cfg.param_scheduler[1]  # MMEngine puts the last epoch there
    average, sparse = cfg.custom_hooks
    assert (average.type, average.momentum) == ('EMAHook', 1e-4)
    assert sparse.preset == preset
    mixes = {mix.type: mix.alpha for mix in cfg.model.train_cfg.augments}
    assert mixes == {'Mixup': 0.8, 'CutMix': 1.0}
    assert cfg.model.head.loss.label_smooth_val == 0.1
    randaugment, erasing = (
        next(t for t in cfg.train_dataloader.dataset.pipeline if t.type == kind)
        for kind in ('RandAugment', 'RandomErasing')
    )
    assert (randaugment.num_policies, randaugment.magnitude_level) == (2, 9)
    assert erasing.erase_prob == 0.25


@pytest.mark.parametrize(
    ('name', 'published', 'weights'),
    [
        ('slak_b_imagenet_384', '85.5', 'slak_base'),
        ('pelk_b_imagenet_384', 'no published', 'pelk_base'),
        ('pelk_b101_imagenet_384', '85.8', 'pelk_base_101'),
    ],
)
def test_imagenet_384_recipe(name, published, weights):
    cfg, text = load(name), (ROOT / f'configs/{name}.py').read_text()
    assert published in text.splitlines()[0]
    assert cfg.model.backbone.type.lower() == f'mmslak.{name[:4]}'
    assert (cfg.model.backbone.arch, cfg.model.backbone.drop_path_rate) == ('base', 0.8)
    for part in (cfg.model.backbone, cfg.model.head):
        assert part.init_cfg.checkpoint == f'checkpoints/{weights}_in1k.pth'
    assert cfg.train_cfg.max_epochs == cfg.param_scheduler[0].end == 30
    assert cfg.auto_scale_lr.base_batch_size == 16 * cfg.train_dataloader.batch_size == 512
    assert cfg.model.train_cfg is None
    assert cfg.model.head.loss.label_smooth_val == 0.1
    assert [hook.preset for hook in cfg.custom_hooks] == ['finetune']
    pipeline = {t.type: t for t in cfg.train_dataloader.dataset.pipeline}
    assert pipeline['RandomResizedCrop'].scale == 384
    assert pipeline['RandAugment'].magnitude_level == 9
    assert pipeline['RandomErasing'].erase_prob == 0.25
    for loader in (cfg.val_dataloader, cfg.test_dataloader):
        assert [t.type for t in loader.dataset.pipeline][1:] == ['Resize', 'PackInputs']
        assert loader.dataset.pipeline[1].scale == (384, 384)


@pytest.mark.parametrize('name', ['slak_b_imagenet_384', 'pelk_b_imagenet_384'])
def test_imagenet_384_begins_with_the_head_of_the_checkpoint(name, tmp_path):
    """Of an official file, as get-checkpoint and convert-checkpoint write it."""
    official, out = GOLDEN / 'slak_decomposed.pth', tmp_path / 'converted.pth'
    assert convert_checkpoint.main([str(official), str(out)]) == 0
    weight, bias = (read_state_dict(official)[f'head.{name}'] for name in ('weight', 'bias'))
    config = load(name).model.head
    config.update(num_classes=weight.shape[0], in_channels=weight.shape[1])
    config.init_cfg.checkpoint = str(out)
    init_default_scope('mmpretrain')
    head = MODELS.build(config)
    head.init_weights()
    assert torch.equal(head.fc.weight, weight)
    assert torch.equal(head.fc.bias, bias)


@pytest.mark.parametrize('name', ['slak_b_imagenet_384', 'pelk_b101_imagenet_384'])
def test_imagenet_384_learning_rates(name):
    """5e-5 · 0.7^(13 − id) for each parameter, and a cosine from all of that to a fiftieth."""
    cfg = load(name)
    init_default_scope(cfg.default_scope)
    small = dict(arch=dict(depths=[3, 3, 27, 3], dims=[4, 4, 4, 4]), width_factor=1.0)
    cfg.model.backbone.update(small, init_cfg=None)
    cfg.model.head.update(in_channels=4, init_cfg=None)
    model = MODELS.build(cfg.model)
    wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    (schedule,) = cfg.param_scheduler
    schedule = {k: v for k, v in schedule.items() if k not in ('type', 'convert_to_iter_based')}
    cosine = CosineAnnealingLR(wrapper, **schedule)
    names = {id(p): n for n, p in model.named_parameters()}

    def rates() -> dict[str, tuple[float, float]]:
        return {
            names[id(p)]: (group['lr'], group['weight_decay'])
            for group in wrapper.optimizer.param_groups
            for p in group['params']
        }

    first = rates()
    assert first.keys() == set(names.values())
    depths = {
        'backbone.downsample_layers.0.0.weight': 0,
        'backbone.stages.0.2.pwconv1.weight': 1,
        'backbone.downsample_layers.1.1.weight': 2,
        'backbone.stages.1.0.pwconv2.weight': 2,
        'backbone.downsample_layers.2.1.weight': 3,
        'backbone.stages.2.2.pwconv1.weight': 3,
        'backbone.stages.2.26.pwconv1.weight': 11,
        'backbone.downsample_layers.3.1.weight': 12,
        'backbone.stages.3.1.pwconv1.weight': 12,
        'backbone.norm3.weight': 13,
        'head.fc.weight': 13,
    }
    for parameter, depth in depths.items():
        rate = 5e-5 * 0.7 ** (13 - depth)
        decay = 0.0 if 'norm' in parameter else 1e-8
        assert first[parameter] == (pytest.approx(rate), decay), parameter
    for _ in range(29):
        cosine.step()
    left = 0.02 + 0.98 * (1 + math.cos(math.pi * 29 / 30)) / 2
    for parameter, (rate, _) in rates().items():
        assert rate == pytest.approx(left * first[parameter][0]), parameter


@pytest.mark.parametrize(
    ('name', 'arch', 'accumulated'),
    [
        ('convnext_t_l2s_slak_t_imagenet', 'tiny', 8),
        ('convnext_s_l2s_slak_s_imagenet', 'small', 16),
    ],
)
def test_distillation_recipe(name, arch, accumulated):
    cfg, plain = load(name), Config.fromstring(CONVNEXT.format(arch), '.py')
    student = cfg.model.student
    assert (student.backbone.arch, student.backbone.drop_path_rate) == (arch, 0.1)
    assert cfg.model.teacher == f'mmslak::slak_{arch[0]}_imagenet'
    assert cfg.model.teacher_checkpoint == f'checkpoints/slak_{arch}_in1k.pth'
    assert cfg.model.loss == dict(type='mmslak.NKD', temperature=1.0, alpha=1.0)
    assert cfg.train_cfg.max_epochs == 300
    assert cfg.optim_wrapper.accumulative_counts == accumulated
    assert cfg.auto_scale_lr.base_batch_size == 4 * cfg.train_dataloader.batch_size == 256
    optimizer = cfg.optim_wrapper.optimizer
    assert (optimizer.type, optimizer.lr, optimizer.weight_decay) == ('AdamW', 4e-3, 0.05)
    (average,) = cfg.custom_hooks
    assert (average.type, average.momentum) == ('EMAHook', 1e-4)
    assert average.interval == accumulated
    assert {mix.type: mix.alpha for mix in student.train_cfg.augments} == {
        'Mixup': 0.8,
        'CutMix': 1.0,
    }
    assert student.head == plain.model.head
    assert cfg.param_scheduler == plain.param_scheduler
    assert cfg.train_dataloader.dataset == plain.train_dataloader.dataset


@pytest.mark.parametrize('kernel', [7, 31, 51, 61])
@pytest.mark.parametrize('form', ['square', 'decomposed'])
@pytest.mark.parametrize('density', ['sparse', 'dense'])
def test_ablation(kernel, form, density):
    cfg = load(f'ablation/slak_t_k{kernel}_{form}_{density}')
    first = cfg.model.backbone.get('kernel_sizes', (51, 49, 47, 13))[0]
    assert first == kernel
    assert cfg.model.backbone.get('decomposed', True) == (form == 'decomposed')
    assert any('Sparse' in hook.type for hook in cfg.custom_hooks) == (density == 'sparse')
    assert cfg.train_cfg.max_epochs == 120
