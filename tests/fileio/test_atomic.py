"""Files that are whole or not there: what is flushed, and when."""

import os
import stat

from mmslak.fileio import atomic


def test_the_file_is_flushed_before_its_name_and_the_folder_after(tmp_path, monkeypatch):
    steps = []
    fsync, replace = os.fsync, os.replace

    def note_fsync(descriptor: int) -> None:
        steps.append('folder' if stat.S_ISDIR(os.fstat(descriptor).st_mode) else 'file')
        fsync(descriptor)

    def note_replace(source, target) -> None:
        steps.append('name')
        replace(source, target)

    monkeypatch.setattr(atomic.os, 'fsync', note_fsync)
    monkeypatch.setattr(atomic.os, 'replace', note_replace)
    atomic.write_atomically(tmp_path / 'x', b'content')
    assert steps == ['file', 'name', 'folder']
