"""Lists of samples that grow while they are read."""

import json

from mmslak.datasets.sample_list import SampleList
from mmslak.datasets.samples import ALPHA, GREY


def test_a_list_is_read_as_it_grows(tmp_path):
    several, other = SampleList(tmp_path / 'odd.jsonl'), SampleList(tmp_path / 'odd.jsonl')
    for number in range(3):
        several.add(f'file {number}', GREY)
        assert list(other.read()[GREY]) == [f'file {i}' for i in range(number + 1)]
    with several.path.open('a') as file:
        file.write('{"file": "half')
    assert other.count() == 3
    several.add('file 0', ALPHA)
    assert list(other.read()) == [GREY, ALPHA]
    assert other.count() == 3
    several.path.write_text('')
    assert other.count() == 0


def test_a_list_has_a_limit(tmp_path):
    several = SampleList(tmp_path / 'odd.jsonl', limit=100)
    for number in range(50):
        several.add(f'file {number}', GREY)
    assert 100 <= several.path.stat().st_size < 200
    assert 1 <= several.count() < 4


def test_a_line_that_is_half_written_does_not_count(tmp_path):
    several = SampleList(tmp_path / 'bad.jsonl')
    several.add('a', 'truncated')
    line = json.dumps(dict(file='b', reason='truncated'))
    for half in (line[:9], line[:-1], '7', '{}', '\0\0\xff'):
        several.path.write_bytes(several.path.read_bytes() + half.encode('latin1') + b'\n')
        assert several.count() == 1
    several.add('b', 'truncated')
    assert several.count() == 2


def test_a_line_after_a_half_written_one_counts(tmp_path):
    several = SampleList(tmp_path / 'bad.jsonl')
    several.path.write_text('{"file": "a", "rea')
    several.add('b', 'truncated')
    assert several.count() == 1
