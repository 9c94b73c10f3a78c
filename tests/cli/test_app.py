"""What `mmslak app` answers, without its page: predictions, places, truth, costs, kernels."""

import json
import threading
from pathlib import Path

import mmcv
import numpy as np
import pytest
import torch
from PIL import Image

from mmslak.analysis import complexity, contribution_scores, effective_receptive_field
from mmslak.apis import inference_model
from mmslak.apis.model import build_backbone, read_model_config
from mmslak.checkpoints import torch_file
from mmslak.cli import app, app_viewer
from mmslak.cli.app_examples import Example, Validation, examples
from mmslak.cli.app_kernels import checkpoints_of, kernels_html, masks_over_training
from mmslak.cli.app_models import load_models
from mmslak.cli.app_viewer import Geometry, Viewer, load_picture
from mmslak.datasets import make_digit_scenes
from mmslak.errors import UserError
from tests import miniatures
from tests.cli.test_analysis_commands import (
    CLASSIFIER,
    DETECTOR,
    SEGMENTOR,
    TINY,
    TINY_CLASSIFIER,
    options,
    save,
)
from tests.golden import ROOT


@pytest.fixture(scope='module')
def data(tmp_path_factory) -> Path:
    """The data of the demo, of few pictures."""
    folder = tmp_path_factory.mktemp('scenes')
    make_digit_scenes(folder, train=2, test=3, train_digits=10, test_digits=10, size=80)
    return folder


def viewer(config: str, pairs: list[str], checkpoint: str | Path, data: Path, tree: str) -> Viewer:
    chosen = dict(options(pairs), data_root=str(data / tree)) if pairs else dict(data_root=data)
    cfg = read_model_config(str(ROOT / config), dict(chosen, data_root=str(data / tree)))
    return Viewer(cfg, str(checkpoint))


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory) -> Path:
    return save(tmp_path_factory.mktemp('segmentor') / 'iter_1.pth', ROOT / SEGMENTOR, TINY)


@pytest.fixture(scope='module')
def segmentor(data, checkpoint) -> Viewer:
    return viewer(SEGMENTOR, TINY, checkpoint, data, 'ade')


@pytest.fixture(scope='module')
def classifier(data) -> Viewer:
    return viewer(CLASSIFIER, TINY_CLASSIFIER, 'none', data, 'cls')


@pytest.fixture(scope='module')
def detector(data) -> Viewer:
    torch.manual_seed(0)
    return viewer(DETECTOR, [], 'none', data, 'coco')


@pytest.fixture(scope='module')
def picture(tmp_path_factory) -> str:
    """Of 120×90, which the pipeline of the digit scenes makes 160×120."""
    path = tmp_path_factory.mktemp('pictures') / 'a.png'
    noise = np.random.default_rng(0).integers(0, 256, (120, 90, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    return str(path)


# ---------------------------------------------------------------- pictures


@pytest.mark.parametrize(
    ('kind', 'suffix'),
    [
        *((form, '.jpg') for form in ('plain', 'grey', 'cmyk', 'exif')),
        *((form, '.png') for form in ('palette', 'alpha', 'deep', 'deep grey')),
    ],
)
def test_pictures_are_decoded_as_by_the_libraries(kind, suffix, tmp_path):
    path = tmp_path / f'a{suffix}'
    size = (60, 90)
    miniatures.write_picture(path, np.random.default_rng(0), miniatures.Kind(size, kind))
    loaded = load_picture(path)
    assert loaded.shape == (*size, 3)
    assert loaded.dtype == np.uint8
    np.testing.assert_array_equal(loaded, mmcv.imread(str(path)))


def test_large_pictures_are_made_smaller(tmp_path):
    Image.new('RGB', (2560, 100), (10, 20, 30)).save(tmp_path / 'a.png')
    loaded = load_picture(tmp_path / 'a.png')
    assert loaded.shape == (50, 1280, 3)
    assert (loaded == (30, 20, 10)).all()


def bad_pictures(folder: Path) -> dict[Path, str]:
    """Files that are no pictures, with what is said of them."""
    text, empty, cut = folder / 'text.jpg', folder / 'empty.png', folder / 'cut.jpg'
    text.write_text('I am no picture.')
    empty.touch()
    Image.effect_noise((200, 200), 90).save(cut)
    cut.write_bytes(cut.read_bytes()[:2000])
    many, gone = folder / 'many.png', folder / 'gone.png'
    Image.new('1', (30000, 4000)).save(many)
    return {
        text: 'text.jpg: not a picture that can be read',
        empty: 'empty.png: the file is empty',
        cut: 'cut.jpg: truncated',
        many: 'many.png: more than 80 million pixels',
        gone: 'gone.png: no such file',
    }


def test_files_that_are_no_pictures(tmp_path):
    for path, says in bad_pictures(tmp_path).items():
        with pytest.raises(UserError) as error:
            load_picture(path)
        assert str(error.value).startswith(says)
        assert str(tmp_path) not in str(error.value)  # where an upload lies is nobody's concern


# ---------------------------------------------------------------- places


def test_places_of_a_resized_picture():
    geometry = Geometry.of(dict(ori_shape=(60, 90), scale_factor=(2.0, 2.0)), (120, 180))
    assert geometry.to_input((0, 0)) == (1, 1)  # the middle of the pixel
    assert geometry.to_input((59, 89)) == (119, 179)
    values = np.arange(120 * 180).reshape(120, 180)
    np.testing.assert_array_equal(geometry.to_picture(values), values[1::2, 1::2])


def test_places_of_a_cropped_picture():
    """Resized from 40×80 to 20×40, of which the centre of 16×16 is taken."""
    geometry = Geometry.of(dict(ori_shape=(40, 80), scale_factor=(0.5, 0.5)), (16, 16))
    assert geometry.offset == (2, 12)
    assert geometry.to_input((4, 24)) == (0, 0)
    assert geometry.to_input((35, 55)) == (15, 15)
    for at in ((3, 40), (36, 40), (20, 23), (20, 56)):
        with pytest.raises(UserError, match='does not see the place'):
            geometry.to_input(at)
    spread = geometry.to_picture(np.ones((16, 16)))
    rows, columns = spread.nonzero()
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (4, 35, 24, 55)


def test_places_without_a_scale_and_with_padding():
    assert Geometry.of(dict(ori_shape=(10, 20)), (20, 40)).scale == (2, 2)
    padded = Geometry.of(dict(ori_shape=(10, 20), scale_factor=(1.0, 1.0)), (16, 32))
    assert padded.offset == (0, 0)
    assert padded.to_input((9, 19)) == (9, 19)


@pytest.mark.parametrize('at', [(120, 0), (0, 90), (-1, 0)])
def test_places_beyond_the_picture(segmentor, picture, at):
    with pytest.raises(UserError, match='the picture has 120 rows and 90 columns'):
        segmentor.field(picture, at)


# ---------------------------------------------------------------- predictions


def test_a_segmentors_classes_and_certainty(segmentor, picture):
    sample = inference_model(segmentor.model, mmcv.imread(picture))
    scores = sample.seg_logits.data.softmax(0)
    for at in ((0, 0), (119, 89), (60, 30)):
        name, certainty = segmentor.there(picture, at)
        label = int(scores[(slice(None), *at)].argmax())
        assert name == 'abcdefghijk'[label]
        assert certainty == pytest.approx(float(scores[(label, *at)]))
    assert 'seg_logits' not in segmentor.see(picture).sample
    np.testing.assert_array_equal(
        segmentor.predict(picture).labels, sample.pred_sem_seg.data[0].numpy()
    )


def test_opacity(segmentor, picture):
    given = mmcv.imread(picture)[..., ::-1]
    clear, full = (segmentor.predict(picture, opacity=o) for o in (0.0, 1.0))
    colours = np.array([colour for _, colour in full.legend])
    assert (full.overlay.reshape(-1, 1, 3) == colours).all(-1).any(1).all()
    same = (clear.overlay == given).all(-1)
    assert ((clear.overlay != full.overlay).any(-1) <= same).all()  # elsewhere are the borders
    assert same.any()


def test_a_detectors_threshold(detector, picture):
    known = detector.see(picture).sample.pred_instances.scores.tolist()
    assert len(known) > 1  # untrained, so that something is found everywhere
    assert min(known) >= app_viewer.LOWEST
    third = sorted(known)[-3:][0]
    fewer = detector.predict(picture, threshold=third).found['instances']
    assert sorted(entry['score'] for entry in fewer) == [s for s in sorted(known) if s >= third]
    # Nothing of what is known has gone.
    assert detector.see(picture).sample.pred_instances.scores.tolist() == known


def test_a_detectors_best_object_at_a_place(detector, picture):
    found = detector.see(picture).sample.pred_instances
    best = int(found.scores.argmax())
    row, column = np.argwhere(np.asarray(found.masks[best]))[0].tolist()
    name, score = detector.there(picture, (row, column), threshold=0.05)
    assert score == pytest.approx(float(found.scores[best]))
    assert name == detector.predictor.class_name(int(found.labels[best]))
    assert detector.there(picture, (row, column), threshold=1.0) is None


def test_a_classifiers_class_is_that_of_the_picture(classifier, picture):
    best = classifier.predict(picture).found['classes'][0]
    assert len(classifier.predict(picture).found['classes']) == 5
    assert classifier.there(picture, (3, 4)) == (best['name'], pytest.approx(best['score']))


def test_what_it_costs(segmentor, picture):
    """The picture of 120×90 becomes one of 160×120, padded to what 32 divides."""
    shape = (160, 128)
    model = segmentor.model
    wanted = complexity(model, shape, lambda x: model.encode_decode(x, [dict(img_shape=shape)]))
    assert segmentor.cost(picture) == wanted.total
    assert segmentor.see(picture).milliseconds > 0


def test_few_pictures_are_remembered(segmentor, tmp_path):
    paths = []
    for i in range(app_viewer.REMEMBERED + 2):
        paths.append(str(tmp_path / f'{i}.png'))
        Image.new('RGB', (64, 64), (i, i, i)).save(paths[-1])
        segmentor.see(paths[-1])
    assert list(segmentor._seen) == paths[2:]
    segmentor.see(paths[2])
    assert list(segmentor._seen) == [*paths[3:], paths[2]]


# ---------------------------------------------------------------- receptive fields


def test_a_field_is_that_of_the_command_at_the_place(segmentor, checkpoint, picture):
    """By the whole model's backbone, which is not loaded a second time."""
    seen = []
    segmentor.backbone.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    backbone = build_backbone(segmentor.cfg.copy(), str(checkpoint), 1)
    for at, place in (((60, 45), (80, 60)), ((0, 89), (0, 119))):
        field = segmentor.field(picture, at, stage=1, scale='papers')
        wanted = effective_receptive_field(backbone, [seen[-1].detach()], place).matrix
        wanted = contribution_scores(wanted[:160, :120]).numpy()
        rows = np.floor((np.arange(120) + 0.5) * 4 / 3).astype(int)
        columns = np.floor((np.arange(90) + 0.5) * 4 / 3).astype(int)
        np.testing.assert_allclose(field.scores, wanted[np.ix_(rows, columns)], atol=1e-6)
        assert [area.ratio for area in field.areas] == sorted(area.ratio for area in field.areas)
    assert tuple(seen[-1].shape) == (1, 3, 160, 128)


def test_a_field_moves_with_its_place(segmentor, picture):
    centres = []
    for at in ((20, 20), (20, 70), (100, 20)):
        scores = segmentor.field(picture, at, stage=0, scale='linear').scores
        assert scores.max() <= 1
        centres.append(np.unravel_index(scores.argmax(), scores.shape))
    for at, centre in zip(((20, 20), (20, 70), (100, 20)), centres):
        assert np.abs(np.subtract(at, centre)).max() < 20
    with pytest.raises(UserError, match='stage=4: the model gives 4'):
        segmentor.field(picture, (0, 0), stage=4)


def test_scales_of_contributions():
    x = torch.tensor([[1000.0, 100.0, 1.0, 0.5, 0.0]])
    log = app_viewer.SCALES['log'](x)
    assert log.tolist() == [pytest.approx([1, 2 / 3, 0, 0, 0], abs=1e-6)]
    linear = app_viewer.SCALES['linear'](x)
    assert linear.tolist() == [pytest.approx([1, 0.1, 0.001, 0.0005, 0])]
    assert app_viewer.SCALES['papers'] is contribution_scores


def test_a_classifier_is_asked_for_maps_and_pools_again(classifier, picture):
    before = classifier.predict(picture).found
    assert classifier.stages == ['stage 3']
    assert classifier.field(picture, (60, 45)).scores.shape == (120, 90)
    assert classifier.backbone.gap_before_final_norm
    classifier._seen.clear()
    assert classifier.predict(picture).found == before


def test_several_threads_never_mix(segmentor, classifier, tmp_path):
    """Answers of many at once are those of one after the other."""
    paths = [str(tmp_path / f'{i}.png') for i in range(2)]
    for i, path in enumerate(paths):
        noise = np.random.default_rng(i).integers(0, 256, (64, 64 + 16 * i, 3), dtype=np.uint8)
        Image.fromarray(noise).save(path)
    jobs = [(v, p, at) for v in (segmentor, classifier) for p in paths for at in ((9, 9), (50, 40))]

    def answer(job: tuple) -> tuple:
        view, path, at = job
        return view.there(path, at), view.field(path, at).scores.tobytes()

    wanted, found = [answer(job) for job in jobs], [None] * len(jobs)
    for view in (segmentor, classifier):
        view._seen.clear()
        view._input.cache_clear()

    def work(index: int) -> None:
        found[index] = answer(jobs[index])

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == wanted


# ---------------------------------------------------------------- examples and truth


def test_truth_of_each_library(segmentor, detector, classifier):
    for view, size in ((segmentor, None), (detector, None), (classifier, (64, 64))):
        validation = Validation(view.cfg)
        first, *_ = validation.examples()
        truth = validation.truth(0)
        picture = load_picture(first.path)
        assert truth.shape[:2] == (size or picture.shape[:2]) or view is detector
        assert first.index == 0
        assert first.thumbnail().size <= (160, 160)
    with pytest.raises(UserError, match='has pictures 0 to 2, not 3'):
        Validation(segmentor.cfg).example(3)


def test_truth_is_drawn_in_the_classes_colours(segmentor, data):
    validation = Validation(segmentor.cfg)
    example = validation.example(1)
    labels = np.asarray(Image.open(data / f'ade/annotations/validation/{example.path.stem}.png'))
    truth = validation.truth(1).astype(int)
    palette = np.array(segmentor.cfg.val_dataloader.dataset.metainfo.palette)
    for value in np.unique(labels)[1:]:  # the borders of digits have their full colours
        there = (truth == palette[value - 1]).all(-1)
        assert there.any()
        assert (labels[there] == value).mean() > 0.9


def test_moves_of_a_slider_load_nothing_again(segmentor, picture, monkeypatch):
    validation, calls = Validation(segmentor.cfg), []
    load, prepare = type(validation.dataset).__getitem__, app_viewer.prepare
    monkeypatch.setattr(
        type(validation.dataset), '__getitem__', lambda *a: (calls.append('truth'), load(*a))[1]
    )
    monkeypatch.setattr(app_viewer, 'prepare', lambda *a: (calls.append('input'), prepare(*a))[1])
    segmentor._input.cache_clear()
    for opacity in (0.2, 0.6):
        segmentor.predict(picture, opacity=opacity)
        segmentor.cost(picture)
        validation.truth(0)
    assert calls == ['input', 'truth']


def test_data_that_are_not_there(segmentor, tmp_path):
    cfg = segmentor.cfg.copy()
    cfg.val_dataloader.dataset.data_root = str(tmp_path / 'gone')
    with pytest.raises(UserError, match='gone'):
        Validation(cfg)
    cfg.val_dataloader = None
    with pytest.raises(UserError, match='has no val_dataloader'):
        Validation(cfg)


def test_photographs_and_scenes_of_the_demo(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    photographs = examples()
    assert 'astronaut' in [example.name for example in photographs]
    (tmp_path / 'data').mkdir()
    (tmp_path / 'data/digit_scenes').symlink_to(data)
    scenes = examples()[len(photographs) :]
    assert len(scenes) == 3
    assert all(example.thumbnail() for example in scenes)
    (tmp_path / 'x.png').touch()
    assert Example('x', tmp_path / 'x.png').thumbnail() is None


# ---------------------------------------------------------------- kernels


def test_kernels_of_a_layer_as_html(segmentor):
    name = 'backbone.stages.0.0.large_kernel'
    assert next(iter(segmentor.layers)) == name
    text = kernels_html(name, segmentor.kernels(name))
    total = 8 * (2 * 13 * 3 + 9)
    assert f'<td>all</td><td></td><td>{total:,}</td><td>100.0%</td>' in text
    assert '<td>vertical</td><td>13×3</td>' in text
    assert text.count('src="data:image/png') == 2


def test_masks_over_training(segmentor, tmp_path):
    layer = 'backbone.stages.0.0.large_kernel'
    state = {k: v.clone() for k, v in segmentor.model.state_dict().items()}
    for number in (100, 9, 20):
        state[f'{layer}.vertical.conv.weight'][: number % 8] = 0
        torch.save(dict(state_dict=state), tmp_path / f'iter_{number}.pth')
    (tmp_path / 'iter_200.pth').write_bytes(b'cut')
    torch.save(dict(state_dict=state), tmp_path / 'best_mIoU_iter_9.pth')
    numbers = [path.stem for path in checkpoints_of(tmp_path)]
    assert numbers == ['iter_9', 'iter_20', 'iter_100', 'iter_200']
    text = masks_over_training(tmp_path, layer, ['vertical', 'horizontal', 'small'])
    assert text.count('<img') == 3
    assert 'iter_200.pth' in text
    zero = 4 * 39 / (8 * (2 * 39 + 9))
    assert f'iter_100.pth: {1 - zero:.1%} not zero' in text
    assert 'No log of sparse training' in text
    assert 'No checkpoint has a mask' in masks_over_training(tmp_path, 'gone', ['vertical'])


# ---------------------------------------------------------------- the command


def test_the_demos_models(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(app.importlib.util, 'find_spec', lambda name: name)
    assert app.main([]) == 2
    said = capsys.readouterr().err
    assert said.startswith('error: no model of the demo in work_dirs/demo: make demo trains them')
    for folder in ('upernet_from_scratch', 'slak_digits'):
        (tmp_path / 'work_dirs/demo' / folder).mkdir(parents=True)
        done = dict(checkpoint=f'/elsewhere/{folder}/epoch_1.pth')
        (tmp_path / f'work_dirs/demo/{folder}/done.json').write_text(json.dumps(done))
    given = app.demo_models()
    assert [model.name for model in given] == ['UperNet from scratch', 'SLaK on single digits']
    assert given[1].config == 'mmslak::demo/slak_digits'
    assert given[1].checkpoint == 'work_dirs/demo/slak_digits/epoch_1.pth'


def test_models_get_names_of_their_own():
    pairs = [('a.py', 'x/iter_1.pth'), ('b.py', 'none'), ('a.py', 'y/iter_1.pth')]
    names = [model.name for model in app.named_models(pairs, None)]
    assert names == ['1: a, iter_1', '2: b, random', '3: a, iter_1']
    assert [model.name for model in app.named_models(pairs[:2], None)] == ['a, iter_1', 'b, random']
    assert app.named_models(pairs[:1], ['mine']) == [('mine', 'a.py', 'x/iter_1.pth')]


def test_without_gradio_it_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(app.importlib.util, 'find_spec', lambda name: None)
    assert app.main(['a.py', 'none']) == 2
    says = "error: the page needs gradio, which is not installed: pip install 'gradio>=6.31,<7'\n"
    assert capsys.readouterr().err == says


def test_a_model_that_is_asked_for_twice_is_loaded_once(tmp_path, checkpoint, data, monkeypatch):
    monkeypatch.chdir(tmp_path)
    reads, load = [], torch_file.load
    monkeypatch.setattr(torch_file, 'load', lambda *a, **o: reads.append(a) or load(*a, **o))
    (tmp_path / 'run').symlink_to(checkpoint.parent)
    config = str(ROOT / SEGMENTOR)
    given = [
        app.Given('one', config, str(checkpoint)),
        app.Given('two', 'mmslak::demo/upernet_slak_digit_scenes', 'run/iter_1.pth'),
        app.Given('random', config, 'none'),
    ]
    models = load_models(given, 'cpu', dict(options(TINY), data_root=str(data / 'ade')))
    assert list(models) == ['one', 'two', 'random']
    assert models['one'].viewer is models['two'].viewer
    assert models['one'].viewer is not models['random'].viewer
    assert len(reads) == 1
    assert (models['one'].folder, models['random'].folder) == (checkpoint.parent, None)
    offers = [example.index for example, _ in models['one'].offers]
    assert offers[:4] == [0, 1, 2, None]


def test_a_model_without_its_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (model,) = load_models([app.Given('a', str(ROOT / SEGMENTOR), 'none')], 'cpu').values()
    assert model.validation is None
    assert 'data/digit_scenes/ade' in model.no_validation
    assert len(model.offers) > 5
    with pytest.raises(UserError, match='gone: no such checkpoint or work folder'):
        load_models([app.Given('a', str(ROOT / SEGMENTOR), 'gone')], 'cpu')


@pytest.mark.parametrize(
    ('argv', 'says'),
    [
        (['a.py'], 'expected pairs of CONFIG and CHECKPOINT'),
        (['a.py', 'none', '--names', 'a', 'b'], '--names: expected 1, got 2'),
        (['--max-upload', '0'], '--max-upload'),
    ],
)
def test_what_the_command_refuses(argv, says, capsys):
    with pytest.raises(SystemExit) as stop:
        app.main(argv)
    assert stop.value.code == 2
    assert says in capsys.readouterr().err
