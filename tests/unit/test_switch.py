"""Files in control/ become orders, once, and a level that changes."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from megalite.observe import switch
from megalite.observe.switch import Orders, Switch


@pytest.fixture
def eye(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Switch:
    monkeypatch.setattr(switch, "PAUSE", 0.0)
    return Switch(tmp_path)


def test_stop_and_save_are_read_once_and_taken_away(eye: Switch, tmp_path: Path) -> None:
    assert eye.read() == Orders()
    (tmp_path / "control/stop").touch()
    (tmp_path / "control/save").touch()
    assert eye.read() == Orders(stop=True, save=True)
    assert eye.read() == Orders()
    assert not list((tmp_path / "control").iterdir())


def test_a_level_counts_until_its_file_is_gone(eye: Switch, tmp_path: Path) -> None:
    path = tmp_path / "control/log-level"
    path.write_text("debug\n")
    assert eye.read().level == logging.DEBUG
    assert eye.read().level == 0, "nothing changed"
    path.unlink()
    assert eye.read().level == logging.INFO


def test_what_is_no_level_is_told_and_changes_nothing(eye: Switch, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "control/log-level").write_text("loud")
    with caplog.at_level(logging.WARNING, logger="megalite"):
        assert eye.read().level == 0
    assert "control/log-level says 'LOUD', but a level is one of DEBUG, INFO, WARNING, ERROR" in caplog.text


def test_a_folder_that_is_gone_is_no_reason_to_end(eye: Switch, tmp_path: Path) -> None:
    (tmp_path / "control").rmdir()
    assert eye.read() == Orders()


def test_the_folder_is_looked_at_once_a_second(tmp_path: Path) -> None:
    eye = Switch(tmp_path)
    eye.read()
    (tmp_path / "control/stop").touch()
    assert eye.read() == Orders()
