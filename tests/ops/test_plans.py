"""The lock that processes of a machine share."""

import pytest

from mmslak.ops.plans import locked


@pytest.mark.parametrize('name', ['', 'new/file.lock'])
def test_one_holds_a_lock_at_a_time(tmp_path, name):
    """Of a folder, which stays empty, or of a file."""
    path = tmp_path / name
    for _ in range(2):  # it is given back
        with locked(path) as first, locked(path, seconds=0.1) as second:
            assert (first, second) == (True, False)


def test_where_no_lock_can_be_made_nothing_is_locked(tmp_path):
    (tmp_path / 'file').touch()
    with locked(tmp_path / 'file/lock') as is_alone:
        assert is_alone
