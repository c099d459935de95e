"""Files are complete or not there, and for whom the umask says."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mvd_fast.files import folder_written_aside, seal, write_text, written_aside

TENSORS = {"x": torch.arange(3.0)}


@pytest.fixture(params=[0o022, 0o027, 0o077], ids=oct)
def mode(request: pytest.FixtureRequest) -> Iterator[int]:
    """What new files may be used for; the umask is set for as long as the test lasts."""
    before = os.umask(request.param)
    yield 0o666 & ~request.param
    os.umask(before)


def modes(folder: Path) -> dict[str, int]:
    return {str(p.relative_to(folder)): stat.S_IMODE(p.stat().st_mode) for p in folder.rglob("*") if p.is_file()}


def test_files_have_the_mode_of_the_umask(tmp_path: Path, mode: int) -> None:
    """Also those of libraries that make files for their owner alone, new ones and replaced ones."""
    for _ in range(2):
        with written_aside(tmp_path / "weights.safetensors") as aside:
            save_file(TENSORS, aside)
        write_text(tmp_path / "list.txt", "a 0")
    assert modes(tmp_path) == {"weights.safetensors": mode, "list.txt": mode}
    assert torch.equal(load_file(tmp_path / "weights.safetensors")["x"], TENSORS["x"])


def test_files_of_folders_have_the_mode_of_the_umask(tmp_path: Path, mode: int) -> None:
    with folder_written_aside(tmp_path / "new") as aside:
        save_file(TENSORS, aside / "model.safetensors")
        (aside / "config.json").write_text("{}")
    (tmp_path / "checkpoint" / "part").mkdir(parents=True)
    save_file(TENSORS, tmp_path / "checkpoint" / "part" / "0.safetensors")
    assert [path.name for path in seal(tmp_path / "checkpoint")] == ["0.safetensors"]
    files = ("new/model.safetensors", "new/config.json", "checkpoint/part/0.safetensors")
    assert modes(tmp_path) == dict.fromkeys(files, mode)


def test_what_was_not_written_does_not_appear(tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("before")
    with pytest.raises(FileNotFoundError), written_aside(tmp_path / "kept"):
        pass
    with pytest.raises(RuntimeError), written_aside(tmp_path / "kept") as aside:
        aside.write_text("half")
        raise RuntimeError
    assert [path.name for path in tmp_path.iterdir()] == ["kept"] and (tmp_path / "kept").read_text() == "before"
