"""tools/prepare_data.py on miniatures, and its downloads from a server on this machine."""

import dataclasses
import io
import re
import tarfile
import zipfile
from pathlib import Path

import pytest
from mmengine.config import Config

import mmslak  # noqa: F401  lets configs inherit from `mmseg::…`
from mmslak.cli import prepare_data
from mmslak.datasets import catalog
from mmslak.datasets.catalog import DATASETS, Dataset
from mmslak.fileio import download
from tests import file_server, miniatures

WRITERS = {
    'ade20k': miniatures.write_ade20k,
    'voc2007': miniatures.write_voc,
    'voc2012': lambda root: miniatures.write_voc(root, year=2012),
    'coco': miniatures.write_coco,
    'imagenet': miniatures.write_imagenet,
}
# Counts of the miniatures, in the order of the catalog.
COUNTS = {
    'ade20k': [4, 4, 2, 2],
    'voc2007': [6, 3],
    'voc2012': [6],
    'coco': [1, 1, 2, 4],
    'imagenet': [9, 9],
}


# Counts that the publishers name.
REAL_COUNTS = {
    'ade20k': [20210, 20210, 2000, 2000],
    'voc2007': [5011, 4952],
    'voc2012': [11540],
    'coco': [1, 1, 5000, 118287],
    'imagenet': [1281167, 50000],
}


def small(name: str, url: str = '') -> Dataset:
    """A data set of the catalog with the counts of its miniature, and archives from `url`."""
    counts = iter(COUNTS[name])

    def shrink(contents):
        return tuple(dataclasses.replace(part, count=next(counts)) for part in contents)

    dataset = DATASETS[name]
    archives = tuple(
        dataclasses.replace(
            archive,
            url=f'{url}/{Path(archive.url).name}',
            checksum=None,
            contents=shrink(archive.contents),
        )
        for archive in dataset.archives
    )
    return dataclasses.replace(dataset, archives=archives, contents=shrink(dataset.contents))


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(download, 'WAIT', 0.0)


# ---------------------------------------------------------------- check


@pytest.mark.parametrize('name', DATASETS)
def test_a_miniature_in_the_format_of_the_data_set_is_complete(tmp_path, name, monkeypatch, capsys):
    monkeypatch.setitem(DATASETS, name, small(name))
    WRITERS[name](tmp_path)
    capsys.readouterr()  # the miniatures import mmdet, which may say something
    for argv in ([name, '--root', str(tmp_path)], ['--root', str(tmp_path), name]):
        assert prepare_data.main(argv) == 0
        assert capsys.readouterr().out == f'{DATASETS[name].title} in {tmp_path}: complete\n'


@pytest.mark.parametrize(
    ('name', 'lost', 'message'),
    [
        ('ade20k', 'images/training/ADE_train_00000001.jpg', 'images/training: 3 files *.jpg'),
        ('ade20k', 'annotations/validation/ADE_val_00000001.png', 'validation: 1 file *.png'),
        ('voc2007', 'VOC2007/JPEGImages/000001.jpg', '1 of its files are missing, first {}'),
        ('voc2007', 'VOC2007/Annotations/000009.xml', 'test.txt: 1 of its files are missing'),
        ('voc2007', 'VOC2007/ImageSets/Main/test.txt', '{}: no such file'),
        ('voc2012', 'VOC2012/Annotations/2012_000001.xml', 'trainval.txt: 1 of its files'),
        ('coco', 'train2017/000000000001.jpg', 'train2017: 3 files *.jpg, expected 4'),
        ('coco', 'annotations/instances_val2017.json', '0 files *instances_val2017.json'),
        ('imagenet', 'val/n01440764/ILSVRC2012_val_00000000.JPEG', 'val: 8 files *.JPEG'),
    ],
)
def test_what_is_missing_is_named(tmp_path, name, lost, message, monkeypatch, capsys):
    monkeypatch.setitem(DATASETS, name, small(name))
    WRITERS[name](tmp_path)
    (tmp_path / lost).unlink()
    capsys.readouterr()
    assert prepare_data.main([name, '--root', str(tmp_path)]) == 1
    output = capsys.readouterr()
    assert '1 problem\n' in output.err
    assert message.format(tmp_path / lost) in output.err
    assert output.out == ''


def test_other_counts_are_problems(tmp_path, monkeypatch):
    miniatures.write_imagenet(tmp_path)
    (tmp_path / 'val' / 'n01440764' / '._hidden.JPEG').touch()  # macOS leaves such files
    assert small('imagenet').problems(tmp_path) == []
    (tmp_path / 'val' / 'n9999').mkdir()
    (tmp_path / 'train' / 'n01440764' / 'extra.JPEG').touch()
    assert small('imagenet').problems(tmp_path) == [
        f'{tmp_path}/train: 10 files *.JPEG, expected 9',
        f'{tmp_path}/val: 1001 class folders, expected 1000',
    ]
    miniatures.write_voc(tmp_path)
    listing = tmp_path / 'VOC2007/ImageSets/Main/test.txt'
    listing.write_text(listing.read_text().splitlines()[0])
    assert small('voc2007').problems(tmp_path) == [f'{listing}: 1 name, expected 3']


@pytest.mark.parametrize('name', DATASETS)
def test_the_catalog_has_the_published_counts_and_a_checksum_of_every_archive(name):
    dataset = DATASETS[name]
    parts = [part for archive in dataset.archives for part in archive.contents]
    assert [part.count for part in [*parts, *dataset.contents]] == REAL_COUNTS[name]
    assert all(re.fullmatch('md5:[0-9a-f]{32}', a.checksum) for a in dataset.archives)


def test_no_two_archives_have_one_checksum():
    checksums = [a.checksum for dataset in DATASETS.values() for a in dataset.archives]
    assert len(set(checksums)) == len(checksums)


def test_the_miniatures_are_not_the_real_thing(tmp_path, capsys):
    for name, writer in WRITERS.items():
        writer(tmp_path / name)
        assert prepare_data.main([name, '--root', str(tmp_path / name)]) == 1
    errors = capsys.readouterr().err
    for count in (20210, 2000, 5011, 4952, 11540, 118287, 5000, 1281167, 50000):
        assert f'expected {count}\n' in errors


@pytest.mark.parametrize(
    ('name', 'base'),
    [
        ('ade20k', 'mmseg::_base_/datasets/ade20k.py'),
        ('voc2007', 'mmdet::_base_/datasets/voc0712.py'),
        ('voc2012', 'mmdet::_base_/datasets/voc0712.py'),
        ('coco', 'mmdet::_base_/datasets/coco_instance.py'),
        ('imagenet', 'mmpretrain::_base_/datasets/imagenet_bs64.py'),
    ],
)
def test_the_default_folder_is_where_the_configs_look(tmp_path, name, base, monkeypatch, capsys):
    config = tmp_path / 'config.py'
    config.write_text(f'_base_ = [{base!r}]\n')
    dataset = Config.fromfile(config).train_dataloader.dataset
    while 'data_root' not in dataset:
        dataset = dataset.get('dataset') or dataset.datasets[0]
    monkeypatch.setitem(DATASETS, name, small(name))
    monkeypatch.chdir(tmp_path)
    WRITERS[name](Path(dataset.data_root))
    assert prepare_data.main([name]) == 0
    assert DATASETS[name].root in capsys.readouterr().out


def test_imagenet_says_where_to_get_it_and_how_to_lay_it_out(tmp_path, capsys):
    for options in ([], ['--download']):
        assert prepare_data.main(['imagenet', '--root', str(tmp_path / 'in1k'), *options]) == 1
        errors = capsys.readouterr().err
        assert 'cannot be downloaded without a login' in errors
        assert 'https://image-net.org' in errors
        assert f'{tmp_path}/in1k/{{train,val}}/CLASS/*.JPEG' in errors


# ---------------------------------------------------------------- download


def pack(name: str, archive: catalog.Archive, tree: Path) -> bytes:
    """The archive as its publisher would make it of a miniature."""
    prefixes = {
        'train2017.zip': ('train2017/',),
        'val2017.zip': ('val2017/',),
        'annotations_trainval2017.zip': ('annotations/',),
    }.get(Path(archive.url).name, ('',))
    files = {}
    for path in sorted(tree.rglob('*')):
        inner = path.relative_to(tree).as_posix()
        if path.is_file() and inner.startswith(prefixes):
            files[f'{archive.inside}/{inner}'.lstrip('/')] = path.read_bytes()
    if 'VOCtrainval_06' in archive.url:
        files.pop('VOCdevkit/VOC2007/ImageSets/Main/test.txt')
    buffer = io.BytesIO()
    if archive.url.endswith('.zip'):
        with zipfile.ZipFile(buffer, 'w') as file:
            for inner, content in files.items():
                file.writestr(inner, content)
    else:
        with tarfile.open(fileobj=buffer, mode='w') as file:
            for inner, content in files.items():
                member = tarfile.TarInfo(inner)
                member.size = len(content)
                file.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


@pytest.fixture
def server():
    with file_server.running() as server:
        yield server


@pytest.fixture
def publish(server, tmp_path, monkeypatch):
    """Puts a miniature of a data set on the server, and the server into the catalog."""

    def publish(name: str) -> list[str]:
        dataset = small(name, server.url('').rstrip('/'))
        monkeypatch.setitem(DATASETS, name, dataset)
        tree = WRITERS[name](tmp_path / 'published' / name)
        names = [Path(archive.url).name for archive in dataset.archives]
        for file, archive in zip(names, dataset.archives):
            server.files[f'/{file}'] = pack(name, archive, tree)
        return names

    return publish


@pytest.mark.parametrize('name', ['ade20k', 'voc2007', 'voc2012', 'coco'])
def test_download(publish, server, tmp_path, name, capsys):
    names = publish(name)
    root = tmp_path / 'data' / 'anywhere'
    command = [name, '--root', str(root), '--download']
    assert prepare_data.main(command) == 0
    output = capsys.readouterr()
    assert output.out.endswith('complete\n')
    assert all(file in output.err for file in names)  # the progress bars
    assert not (root / 'archives').exists()
    assert prepare_data.main(command) == 0
    assert len(server.asked) == len(names)  # the second run had nothing to get


def test_only_what_is_missing_is_downloaded(publish, server, tmp_path):
    publish('coco')
    command = ['coco', '--root', str(tmp_path / 'coco'), '--download']
    assert prepare_data.main(command) == 0
    server.asked.clear()
    (tmp_path / 'coco/val2017/000000001001.jpg').unlink()
    server.files = {'/val2017.zip': server.files['/val2017.zip']}
    assert prepare_data.main(command) == 0
    assert server.asked == [None]


def test_an_interrupted_download_goes_on(publish, server, tmp_path, monkeypatch, capsys):
    publish('ade20k')
    monkeypatch.setattr(download, 'RETRIES', 0)
    server.faults = [1000, 0]
    command = ['ade20k', '--root', str(tmp_path / 'ade'), '--download']
    assert prepare_data.main(command) == 2
    assert 'run the command again' in capsys.readouterr().err
    assert prepare_data.main(command) == 0
    assert server.asked == [None, 'bytes=1000-', 'bytes=1000-']


def test_ctrl_c_says_how_to_go_on(publish, tmp_path, monkeypatch, capsys):
    publish('ade20k')

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare_data, 'fetch', interrupted)
    assert prepare_data.main(['ade20k', '--root', str(tmp_path), '--download']) == 130
    assert 'run the command again' in capsys.readouterr().err


def test_an_interrupted_unpacking_is_done_again(publish, server, tmp_path):
    """The counts are right, but the last file is half there; its archive tells."""
    publish('ade20k')
    root = tmp_path / 'ade'
    command = ['ade20k', '--root', str(root), '--download']
    assert prepare_data.main(command) == 0
    file = root / 'images/validation/ADE_val_00000002.jpg'
    whole = file.read_bytes()
    file.write_bytes(whole[:100])
    (root / 'archives').mkdir()
    (root / 'archives/ADEChallengeData2016.zip').write_bytes(
        server.files['/ADEChallengeData2016.zip']
    )
    assert prepare_data.main(command) == 0
    assert file.read_bytes() == whole


def test_a_corrupt_archive_is_an_error_and_a_retry_starts_anew(
    publish, server, tmp_path, monkeypatch, capsys
):
    publish('voc2012')
    dataset = DATASETS['voc2012']
    (archive,) = dataset.archives
    wrong = dataclasses.replace(archive, checksum='md5:' + '0' * 32)
    monkeypatch.setitem(DATASETS, 'voc2012', dataclasses.replace(dataset, archives=(wrong,)))
    command = ['voc2012', '--root', str(tmp_path / 'VOCdevkit'), '--download']
    assert prepare_data.main(command) == 2
    assert f'expected {"0" * 32}, got ' in capsys.readouterr().err
    assert not (tmp_path / 'VOCdevkit/VOC2012').exists()
    monkeypatch.setitem(DATASETS, 'voc2012', dataset)
    assert prepare_data.main(command) == 0
    assert server.asked == [None, None]


def test_an_archive_that_cannot_be_unpacked_is_one_line(publish, server, tmp_path, capsys):
    publish('voc2012')
    server.files['/VOCtrainval_11-May-2012.tar'] = b'no archive' * 100
    command = ['voc2012', '--root', str(tmp_path / 'VOCdevkit'), '--download']
    assert prepare_data.main(command) == 2
    assert 'neither a zip nor a tar archive' in capsys.readouterr().err.splitlines()[-1]
