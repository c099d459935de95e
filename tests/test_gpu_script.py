"""benchmarks/gpu.sh where there is no GPU: what it says, and that its JSON is there whatever happens."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu.sh"


def run(out: Path, *arguments: str, **settings: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""} | settings
    return subprocess.run([SCRIPT, out, *arguments], env=environment, capture_output=True, text=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path):
    result = run(tmp_path / "out.json")
    assert result.returncode == 1
    assert result.stderr.startswith("gpu.sh needs a CUDA device, and torch sees none")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_json_has_how_files_ended_and_the_benchmarks(tmp_path):
    out = tmp_path / "out.json"
    result = run(out, "-k", "test_philox or bench_tube_mask and ours", MVD_GPU_ON_CPU="1")
    assert result.returncode == 0, result.stdout + result.stderr
    found = json.loads(out.read_text())
    assert found["parts"]["tests/test_tube_mask.py"]["said"].startswith("3 passed")
    assert found["machine_info"]["torch"] == torch.__version__
    assert [one["name"] for one in found["benchmarks"]] == ["test_tube_mask[ours]"]


@pytest.mark.slow
def test_without_pytest_benchmark_and_pip_tests_run_and_a_sentence_says_it(tmp_path):
    """A Python that finds neither: the folder of the checkout that might hold them is another."""
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    for name in ("pytest_benchmark", "pip"):
        (hidden / f"{name}.py").write_text("raise ImportError")
    out = tmp_path / "out.json"
    result = run(out, "-k", "test_philox", MVD_GPU_ON_CPU="1", PYTHONPATH=str(hidden), MVD_GPU_PACKAGES=str(tmp_path))
    assert result.returncode == 1
    assert "gpu.sh runs no benchmarks: pytest-benchmark is not installed and pip cannot fetch it" in result.stderr
    found = json.loads(out.read_text())
    assert found["parts"]["tests/test_tube_mask.py"]["said"].startswith("3 passed")
    assert found["benchmarks"] == [] and not any("bench_" in file for file in found["parts"])


def test_the_engines_tests_for_a_gpu_run_there(monkeypatch, capsys):
    monkeypatch.syspath_prepend(SCRIPT.parent)
    monkeypatch.chdir(SCRIPT.parents[1])
    import gpu_run

    chosen = gpu_run.test_files()
    marked = {"tests/test_prefetch.py", "tests/test_launch.py"}
    assert marked <= {file for file, arguments in chosen.items() if arguments == ["-m", "gpu"]}
    assert chosen["tests/test_attention.py"] == [] and "tests/test_training.py" not in chosen
    monkeypatch.setattr(gpu_run, "find_spec", lambda name: None)
    assert not marked & set(gpu_run.test_files())
    assert "left out, as einops and pydantic are not installed here: " in capsys.readouterr().out


def test_what_fails_or_takes_too_long_is_not_well(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(SCRIPT.parent)
    import gpu_run

    def ended(content: str, seconds: float = 60) -> dict:
        (tmp_path / "test_one.py").write_text(content)
        return gpu_run.run(str(tmp_path / "test_one.py"), seconds, ["-k", ""])

    assert ended("def test(): pass")["exit"] in gpu_run.WELL
    assert ended("")["exit"] in gpu_run.WELL  # nothing is collected
    failed = ended("def test(): assert 1 == 2")
    assert failed["exit"] == 1 and any("assert 1 == 2" in line for line in failed["log"])
    monkeypatch.setattr(gpu_run, "GRACE", 1)
    deaf = "import signal, time\ndef test():\n signal.signal(signal.SIGINT, signal.SIG_IGN)\n time.sleep(60)"
    assert ended(deaf, 5)["exit"] not in gpu_run.WELL
