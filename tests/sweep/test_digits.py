"""python -m mbkit sweep: a search on the digits, which the same command finds again."""

from __future__ import annotations

from pathlib import Path

import pytest

from mbkit.__main__ import main


@pytest.mark.parametrize("model", ["mlp", pytest.param("lenet", marks=pytest.mark.slow)])
def test_the_command_searches_and_goes_on(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["sweep", "--model", model, "--trials", "6", "--rungs", "1", "2", "--folder", str(tmp_path / "runs")]
    assert main([*command, "--figure", str(tmp_path / "sweep.png")]) == 0
    first = capsys.readouterr().out
    assert "Sweep: 6 trials; epochs: 6 after 1, 2 after 2" in first
    assert "of the test digits right" in first
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr("mbkit.sweep.worker.train_steps", None)  # nothing is trained again
    assert main(command) == 0
    assert capsys.readouterr().out == first[: first.index("\nPicture")]
    assert main([*command, "--seed", "1"]) == 2
    assert "choose another folder" in capsys.readouterr().err
