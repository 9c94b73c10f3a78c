"""How `--cfg-options` is read."""

from mmengine.config import DictAction


class OptionsAction(DictAction):
    """`--cfg-options`, with argparse's own error in place of a traceback for a malformed pair.

    Paths keep their spaces, which MMEngine takes out of every value.
    """

    def __call__(self, parser, namespace, values, option_string=None):
        for pair in values:
            if '=' not in pair:
                parser.error(f'{option_string} {pair}: expected KEY=VALUE')
        try:
            super().__call__(parser, namespace, values, option_string)
        except AssertionError as error:  # unbalanced brackets
            parser.error(f'{option_string}: {error}')

    @staticmethod
    def _parse_iterable(val):
        if set(val).isdisjoint(',[('):
            return DictAction._parse_int_float_bool(val.strip('\'"'))
        return DictAction._parse_iterable(val)
