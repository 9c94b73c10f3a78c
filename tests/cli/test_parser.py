import warnings

import pytest

from mmslak.cli.parser import NOISE, add_cfg_options, command_parser, one_line_errors


def test_commands_pass_over_known_warnings_alone():
    @one_line_errors
    def main(argv: list[str]) -> None:
        for message in (*NOISE, 'something else'):
            warnings.warn(f'{message}, so to say', stacklevel=1)

    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter('always')
        assert main([]) == 0
    assert [str(warning.message) for warning in seen] == ['something else, so to say']


@pytest.mark.parametrize(
    ('text', 'value'),
    [
        ('/my data/ade', '/my data/ade'),  # MMEngine alone takes the space out
        ('"/my data/ade"', '/my data/ade'),
        ('3', 3),
        ('0.5', 0.5),
        ('None', None),
        ('True', True),
        ('[1, 2]', [1, 2]),
        ('(1, 2)', (1, 2)),
        ('1, 2', [1, 2]),
    ],
)
def test_values_of_cfg_options(text, value):
    parser = command_parser('train', '')
    add_cfg_options(parser)
    assert parser.parse_args(['--cfg-options', f'key={text}']).cfg_options == {'key': value}
