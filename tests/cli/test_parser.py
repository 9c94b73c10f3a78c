import pytest

from mmslak.cli.parser import add_cfg_options, command_parser


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
