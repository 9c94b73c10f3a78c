"""The state of the operator's measured choices, as a process begins with it."""

from pathlib import Path

import pytest

from mmslak.ops import choice, plans


def begin_anew(monkeypatch: pytest.MonkeyPatch, cache: Path | None = None) -> None:
    """Forgets all choices as a new process does, with another cache on disk if one is given."""
    for name in ('_plans', '_used', '_restored', '_stores'):
        monkeypatch.setattr(choice, name, {})
    monkeypatch.setattr(choice, '_makeshift', set())
    monkeypatch.setattr(plans, 'TABLES', Path('none'))  # what is shipped for this machine
    choice.plain_calls.clear()
    monkeypatch.setattr(choice, '_spent', 0.0)
    monkeypatch.setattr(choice, '_measured', 0)
    monkeypatch.setattr(choice, '_told', 0)
    if cache is not None:
        monkeypatch.setenv('MMSLAK_CACHE', str(cache))
