"""Students with teachers: the student in all but its loss, in training, files and commands."""

import copy
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.optim.optimizer import amp_optimizer_wrapper
from mmengine.registry import MODELS, init_default_scope
from torch import nn
from torch.utils.data import Dataset

from mmslak.analysis import complexity
from mmslak.apis.model import build_backbone, build_model, read_model_config
from mmslak.cli.config_checks import check_datasets, check_pretrained
from mmslak.errors import CheckpointError, UserError
from mmslak.models import CWD, KD, NKD
from tests import toy
from tests.golden import GOLDEN, slak_expected, slak_options

STUDENT = dict(
    type='ImageClassifier',
    backbone=dict(
        type='ConvNeXt',
        arch=dict(depths=[1, 1, 1, 1], channels=[4, 8, 8, 8]),
        layer_scale_init_value=1.0,
        out_indices=(3,),
    ),
    head=dict(type='LinearClsHead', num_classes=4, in_channels=8),
)
SLAK = dict(
    type='mmslak.SLaK',
    arch=dict(depths=[1, 1, 1, 1], dims=[4, 4, 4, 8]),
    kernel_sizes=(9, 7, 5, 5),
    small_kernel=3,
    width_factor=1.0,
    layer_scale_init_value=1.0,
)
TEACHER = dict(
    STUDENT, backbone=dict(SLAK, out_indices=3, gap_before_final_norm=True, drop_path_rate=0.5)
)
SEGMENTOR = dict(
    type='EncoderDecoder',
    data_preprocessor=dict(type='SegDataPreProcessor', size=(32, 32)),
    backbone=dict(
        type='mmpretrain.ConvNeXt',
        arch=dict(depths=[1, 1], channels=[4, 8]),
        out_indices=(0, 1),
        gap_before_final_norm=False,
    ),
    decode_head=dict(
        type='FCNHead', in_channels=8, in_index=1, channels=4, num_classes=3, dropout_ratio=0.0
    ),
    auxiliary_head=dict(
        type='FCNHead', in_channels=4, in_index=0, channels=4, num_classes=3, dropout_ratio=0.0
    ),
)
# Its logits are as large again as the student's.
SEG_TEACHER = dict(
    SEGMENTOR,
    backbone=dict(SLAK, out_indices=(0, 1)),
    decode_head=dict(SEGMENTOR['decode_head'], in_channels=4, in_index=0),
    auxiliary_head=None,
)


def random_weights(model: nn.Module, seed: int = 1) -> nn.Module:
    """Other weights and statistics than a new model has."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.1)
    return model


def build(config: dict, scope: str = 'mmpretrain') -> nn.Module:
    init_default_scope(scope)
    return MODELS.build(copy.deepcopy(config))


@pytest.fixture
def checkpoint(tmp_path) -> str:
    """The teacher's file."""
    path = tmp_path / 'teacher.pth'
    torch.save(dict(state_dict=random_weights(build(TEACHER)).state_dict()), path)
    return str(path)


@pytest.fixture
def distilled(checkpoint) -> dict:
    return dict(
        type='mmslak.DistilledClassifier',
        student=STUDENT,
        teacher=TEACHER,
        teacher_checkpoint=checkpoint,
    )


@pytest.fixture
def seg_distilled(tmp_path) -> dict:
    path = tmp_path / 'seg_teacher.pth'
    teacher = random_weights(build(SEG_TEACHER, 'mmseg'))
    torch.save(dict(state_dict=teacher.state_dict()), path)
    return dict(
        type='mmslak.DistilledSegmentor',
        student=SEGMENTOR,
        teacher=SEG_TEACHER,
        teacher_checkpoint=str(path),
    )


def ready(config: dict, scope: str = 'mmpretrain', seed: int = 0) -> nn.Module:
    """A model as training begins with it."""
    torch.manual_seed(seed)
    model = build(config, scope)
    model.init_weights()
    return model


def pictures(count: int = 3) -> torch.Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(2))


def samples(labels: list[int]) -> list:
    from mmpretrain.structures import DataSample

    return [DataSample().set_gt_label(label) for label in labels]


def seg_samples(count: int) -> list:
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    labels = torch.randint(0, 3, (count, 1, 32, 32), generator=torch.Generator().manual_seed(3))
    return [SegDataSample(gt_sem_seg=PixelData(data=one)) for one in labels]


# ---------------------------------------------------------------- the loss


@pytest.mark.parametrize(
    'loss', [None, dict(type='mmslak.NKD', temperature=2.0), dict(type='mmslak.KD', alpha=0.3)]
)
def test_the_loss_is_between_the_logits_of_both(distilled, loss):
    model = ready(dict(distilled, loss=loss))
    teacher = random_weights(build(TEACHER)).eval()
    expected = dict(NKD=NKD, KD=KD)[(loss or dict(type='mmslak.NKD'))['type'][7:]](
        **{k: v for k, v in (loss or {}).items() if k != 'type'}
    )
    x, labels = pictures(), torch.tensor([1, 0, 3])
    found = model(x, samples(labels.tolist()), mode='loss')
    assert found.keys() == {'loss'}
    assert torch.equal(found['loss'], expected(model(x), teacher(x), labels))

    mixed = samples([1, 0, 3])
    scores = torch.tensor([[0.4, 0.6, 0, 0], [0.9, 0, 0.1, 0], [0, 0.2, 0, 0.8]])
    for sample, score in zip(mixed, scores, strict=True):
        sample.set_gt_score(score)
    found = model(x, mixed, mode='loss')['loss']
    assert torch.equal(found, expected(model(x), teacher(x), scores))


def test_both_see_the_pictures_that_are_mixed(distilled, monkeypatch):
    seen = []
    student = dict(STUDENT, train_cfg=dict(augments=dict(type='Mixup', alpha=0.8)))
    model = ready(dict(distilled, student=student, data_preprocessor=dict(num_classes=4)))
    for part in (model.backbone, model.teacher.model.backbone):
        part.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    data = model.data_preprocessor(dict(inputs=pictures(), data_samples=samples([1, 0, 3])), True)
    assert 'gt_score' in data['data_samples'][0]
    model(**data, mode='loss')
    assert torch.equal(*seen)
    assert not torch.equal(seen[0], pictures())


def test_a_segmentor_has_its_own_losses_beside(seg_distilled):
    model = ready(seg_distilled, 'mmseg')
    plain = build(SEGMENTOR, 'mmseg')
    plain.load_state_dict(model.state_dict())
    teacher = random_weights(build(SEG_TEACHER, 'mmseg')).eval()
    x, labels = pictures(2), seg_samples(2)
    found, own = model(x, labels, mode='loss'), plain(x, labels, mode='loss')
    assert found.keys() == {*own, 'loss_distillation'}
    assert {'decode.loss_ce', 'decode.acc_seg', 'aux.loss_ce'} <= own.keys()
    for name, value in own.items():
        assert torch.equal(found[name], value), name
    logits = plain(x)
    assert logits.shape[2:] == (4, 4)
    assert teacher(x).shape[2:] == (8, 8)
    assert torch.equal(found['loss_distillation'], CWD()(logits, teacher(x)))


@pytest.mark.parametrize('kind', ['classifier', 'segmentor'])
def test_gradients_reach_the_student_alone(distilled, seg_distilled, kind):
    is_segmentor = kind == 'segmentor'
    model = ready(
        seg_distilled if is_segmentor else distilled, 'mmseg' if is_segmentor else 'mmpretrain'
    )
    labels = seg_samples(2) if is_segmentor else samples([1, 0])
    before = copy.deepcopy(model.teacher.model.state_dict())
    losses = model(pictures(2), labels, mode='loss')
    learnt = losses['loss_distillation' if is_segmentor else 'loss']
    (stem,) = torch.autograd.grad(learnt, model.backbone.downsample_layers[0][0].weight, None, True)
    assert stem.abs().min() > 0
    sum(value for name, value in losses.items() if 'loss' in name).backward()
    assert all(p.grad is not None for p in model.parameters())
    assert all(p.grad is None for p in model.teacher.model.parameters())
    toy.assert_same(model.teacher.model.state_dict(), before)  # running statistics, too


# ---------------------------------------------------------------- nobody else sees the teacher


def test_it_is_the_student(distilled):
    model, plain = ready(distilled), build(STUDENT)
    assert isinstance(model, type(plain))
    assert list(model.state_dict()) == list(plain.state_dict())
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in plain.named_parameters()]
    assert {type(m) for m in model.modules()} == {type(model), NKD} | {
        type(m) for m in plain.modules()
    } - {type(plain)}
    plain.load_state_dict(model.state_dict())
    assert torch.equal(plain.eval()(pictures()), model.eval()(pictures()))


def test_the_teacher_stays_in_eval_mode(distilled):
    model = ready(distilled)
    teacher = model.teacher.model
    for mode in (True, False, True):
        model.train(mode)
        model(pictures(), samples([1, 0, 3]), mode='loss')
        assert model.training == mode
        assert not any(module.training for module in teacher.modules())
    assert not any(p.requires_grad for p in teacher.parameters())


def test_copies_share_the_teacher(distilled):
    """Averaged weights are a deep copy, which may be sent to another device."""
    model = ready(distilled)
    other = copy.deepcopy(model).to(torch.float64)
    assert other.teacher is model.teacher
    assert {p.dtype for p in model.teacher.model.parameters()} == {torch.float32}
    assert other.head.fc.weight.dtype == torch.float64


class Data(Dataset):
    """Noise with a class, as mmpretrain packs it."""

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict:
        generator = torch.Generator().manual_seed(index)
        return dict(
            inputs=torch.randn(3, 32, 32, generator=generator),
            data_samples=samples([index % 4])[0],
        )


class SegData(Data):
    """Noise with a class at each pixel, as mmseg packs it."""

    def __getitem__(self, index: int) -> dict:
        return super().__getitem__(index) | dict(data_samples=seg_samples(16)[index])


DATA = dict(mmpretrain=Data, mmseg=SegData)


def train(folder: Path, config: dict, scope: str = 'mmpretrain', **options):
    init_default_scope(scope)
    torch.manual_seed(0)
    return toy.train(
        folder, model=build(config, scope), data=DATA[scope](), default_scope=scope, **options
    )


def test_the_teacher_costs_no_bytes(distilled, tmp_path):
    """Of a checkpoint with optimizer and averages."""
    options = dict(ema=True, iters=4, optimizer=toy.ADAMW)
    train(tmp_path / 'distilled', distilled, **options)
    train(tmp_path / 'plain', STUDENT, **options)
    ours, plain = (toy.load(tmp_path / name, 4) for name in ('distilled', 'plain'))
    for key in ('state_dict', 'ema_state_dict'):
        assert ours[key].keys() == plain[key].keys()
    for key in ('state', 'param_groups'):
        assert len(ours['optimizer'][key]) == len(plain['optimizer'][key])
    assert ours.keys() == plain.keys()


@pytest.mark.parametrize('scope', DATA)
def test_training_with_accumulation_goes_on_to_the_bit(distilled, seg_distilled, tmp_path, scope):
    student = dict(STUDENT, train_cfg=dict(augments=dict(type='Mixup', alpha=0.8)))
    config = dict(distilled, student=student, data_preprocessor=dict(num_classes=4))
    config = seg_distilled if scope == 'mmseg' else config
    head = 'decode_head.conv_seg.weight' if scope == 'mmseg' else 'head.fc.weight'
    options = dict(ema=True, iters=8, save_every=4, wrapper=dict(accumulative_counts=2))
    options['scope'] = scope
    options['hooks'] = [dict(type='mmslak.ExactResumeHook')]
    whole = train(tmp_path / 'whole', config, **options)
    file = str(tmp_path / 'whole/iter_4.pth')
    resumed = train(tmp_path / 'resumed', config, load_from=file, resume=True, **options)
    for one, other in zip(toy.records(resumed), toy.records(whole)[4:], strict=True):
        toy.assert_same(one, other)
    weights = toy.records(whole)[-1]['weights']
    assert not torch.equal(weights[head], toy.start(whole)['weights'][head])


@pytest.mark.filterwarnings('ignore:.*GradScaler is enabled, but CUDA is not available')
@pytest.mark.parametrize('scope', DATA)
def test_bf16(distilled, seg_distilled, tmp_path, monkeypatch, scope):
    """Mixed precision on a CPU; AmpOptimWrapper alone asks for an accelerator."""
    monkeypatch.setattr(amp_optimizer_wrapper, 'is_cuda_available', lambda: True)
    dtypes, losses = set(), []
    model = build(seg_distilled if scope == 'mmseg' else distilled, scope)
    for one in (model, model.teacher.model):
        part = one.decode_head.conv_seg if scope == 'mmseg' else one.head.fc
        part.register_forward_hook(lambda module, inputs, output: dtypes.add(output.dtype))
    model.distillation_loss.register_forward_hook(lambda *call: losses.append(call[-1]))
    wrapper = dict(type='AmpOptimWrapper', dtype='bfloat16')
    data = DATA[scope]()
    toy.train(tmp_path, model=model, data=data, iters=3, optimizer=toy.ADAMW, wrapper=wrapper)
    assert dtypes == {torch.bfloat16}
    assert {loss.dtype for loss in losses} == {torch.float32}
    assert all(loss.isfinite() for loss in losses)


# ---------------------------------------------------------------- what teachers are made of


def test_a_teacher_in_the_official_names(tmp_path):
    """The reference's own file, and the logits that it gives."""
    options = slak_options('slak_decomposed')
    expected = slak_expected('slak_decomposed')
    classes = len(expected['logits'][0])
    backbone = dict(type='mmslak.SLaK', out_indices=3, gap_before_final_norm=True, **options)
    width = int(options['arch']['dims'][-1] * options['width_factor'])
    head = dict(type='LinearClsHead', num_classes=classes, in_channels=width)
    student = dict(STUDENT, head=dict(STUDENT['head'], num_classes=classes))
    model = build(
        dict(
            type='mmslak.DistilledClassifier',
            student=student,
            teacher=dict(type='ImageClassifier', backbone=backbone, head=head),
            teacher_checkpoint=str(GOLDEN / 'slak_decomposed.pth'),
        )
    )
    found = model.teacher(torch.from_numpy(expected['input']))  # it loads its weights itself
    torch.testing.assert_close(found, torch.from_numpy(expected['logits']), rtol=1e-4, atol=1e-5)


def test_configs_by_their_file(distilled, tmp_path):
    inputs = dict(num_classes=4, mean=[1, 2, 3], std=[1, 1, 1])
    text = f'default_scope = "mmpretrain"\ndata_preprocessor = {inputs}\n'
    (tmp_path / 'student.py').write_text(f'{text}model = {STUDENT}\n')
    (tmp_path / 'teacher.py').write_text(f'{text}model = {TEACHER}\n')
    files = dict(student=str(tmp_path / 'student.py'), teacher=str(tmp_path / 'teacher.py'))
    model = ready(dict(distilled, **files))
    assert model.data_preprocessor.mean.flatten().tolist() == [1, 2, 3]
    assert model(pictures(1), samples([1]), mode='loss')['loss'].isfinite()

    (tmp_path / 'other.py').write_text(f'{text.replace("1, 2, 3", "1, 2, 4")}model = {TEACHER}\n')
    with pytest.raises(ValueError, match=r'have mean=\[1, 2, 3\] and mean=\[1, 2, 4\]'):
        build(dict(distilled, **files | dict(teacher=str(tmp_path / 'other.py'))))


def test_a_teacher_without_all_its_weights_is_refused(distilled, tmp_path):
    torch.save(dict(state_dict=build(STUDENT).state_dict()), tmp_path / 'other.pth')
    with pytest.raises(UserError, match=r'other\.pth does not fit the config: '):
        ready(dict(distilled, teacher_checkpoint=str(tmp_path / 'other.pth')))
    model = build(dict(distilled, teacher_checkpoint=str(tmp_path / 'none.pth')))
    with pytest.raises(CheckpointError, match=r'none\.pth: no such checkpoint file'):
        model(pictures(1), samples([1]), mode='loss')


def test_other_classes_are_refused(distilled):
    student = dict(STUDENT, head=dict(STUDENT['head'], num_classes=5))
    model = ready(dict(distilled, student=student))
    message = r'logits of the same classes from student and teacher, got \(2, 5\) and \(2, 4\)'
    with pytest.raises(ValueError, match=message):
        model(pictures(2), samples([1, 0]), mode='loss')


@pytest.mark.parametrize(
    ('change', 'name'),
    [
        (dict(type='CascadeEncoderDecoder', num_stages=1), 'ModuleList'),
        (dict(type='DepthEstimator'), 'DepthEstimator'),
    ],
)
def test_segmentors_with_other_losses_are_refused(seg_distilled, change, name):
    student = dict(SEGMENTOR, **change)
    if 'num_stages' in change:
        student['decode_head'] = [SEGMENTOR['decode_head']]
    with pytest.raises(TypeError, match=f'{name} computes its losses otherwise'):
        build(dict(seg_distilled, student=student), 'mmseg')


@pytest.mark.parametrize('head', ['ArcFaceClsHead', 'MultiLabelLinearClsHead'])
def test_classifiers_with_other_losses_are_refused(distilled, head):
    """A margin would be lost, and several labels of a picture would become one."""
    student = dict(STUDENT, head=dict(type=head, num_classes=4, in_channels=8))
    with pytest.raises(TypeError, match=f'{head} computes its loss otherwise than ClsHead'):
        build(dict(distilled, student=student))


def test_pictures_have_to_be_normalised_alike(distilled):
    ours = dict(type='ClsDataPreprocessor', mean=[1, 2, 3], std=[1, 1, 1], to_rgb=True)
    teacher = dict(TEACHER, data_preprocessor=dict(ours, mean=(1.0, 2.0, 3.0)))
    build(dict(distilled, teacher=teacher, data_preprocessor=ours))
    for change, says in (
        (dict(std=[1, 1, 2]), r'std=\[1, 1, 1\] and std=\[1, 1, 2\]'),
        (dict(to_rgb=False), 'to_rgb=True and to_rgb=False'),
        (dict(mean=None, std=None), r'mean=\[1, 2, 3\] and mean=None'),
    ):
        teacher = dict(TEACHER, data_preprocessor=dict(ours, **change))
        with pytest.raises(ValueError, match=says):
            build(dict(distilled, teacher=teacher, data_preprocessor=ours))


# ---------------------------------------------------------------- commands


def written(folder: Path, model: dict) -> Path:
    path = folder / 'config.py'
    preprocessor = dict(mean=[1.0, 2.0, 3.0], std=[1.0, 1.0, 1.0])
    path.write_text(
        f'default_scope = "mmpretrain"\ndata_preprocessor = {preprocessor}\nmodel = {model}\n'
    )
    return path


def test_commands_see_the_student(distilled, tmp_path):
    """Those that analyse, export and predict read their config this way."""
    cfg = read_model_config(written(tmp_path, dict(distilled, teacher_checkpoint='none.pth')))
    plain = read_model_config(written(tmp_path, STUDENT))
    assert cfg.model == plain.model
    assert complexity(build_model(cfg), (32, 32)) == complexity(build_model(plain), (32, 32))
    assert type(build_backbone(cfg)).__name__ == 'ConvNeXt'


def test_settings_of_the_student_stand_inside(distilled, tmp_path):
    path = written(tmp_path, dict(distilled, backbone=dict(frozen_stages=1)))
    message = r'^model\.backbone: .*that of its student is model\.student\.backbone'
    with pytest.raises(UserError, match=message):
        read_model_config(path)


def test_training_asks_for_the_file_of_the_teacher(distilled, tmp_path):
    file = tmp_path / 'slak_tiny_in1k.pth'
    inner = dict(type='Pretrained', checkpoint='not needed')
    teacher = dict(TEACHER, backbone=dict(TEACHER['backbone'], init_cfg=inner))
    model = dict(distilled, teacher=teacher, teacher_checkpoint=str(file))
    cfg = Config.fromfile(written(tmp_path, model))
    with pytest.raises(UserError) as error:
        check_pretrained(cfg)
    said = str(error.value)
    assert said.startswith(f'pretrained weights {file} not found (model.teacher_checkpoint); get')
    assert 'mmslak get-checkpoint slak_tiny' in said
    assert 'train without' not in said
    file.touch()
    check_pretrained(cfg)


def test_a_wrong_number_of_classes_names_the_option(distilled, tmp_path):
    for name in 'abc':
        (tmp_path / 'train' / name).mkdir(parents=True)
        (tmp_path / 'train' / name / '1.jpg').touch()
    cfg = Config.fromfile(written(tmp_path, distilled))
    cfg.default_scope = 'mmdet'  # where too many are an error, too
    cfg.train_dataloader = dict(
        dataset=dict(type='mmpretrain.CustomDataset', data_root=str(tmp_path), data_prefix='train')
    )
    with pytest.raises(UserError, match=r'model\.student\.head\.num_classes=3'):
        check_datasets(cfg, ['train_dataloader'])
