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
def test_the_json_has_what_passed_and_what_failed(tmp_path):
    out = tmp_path / "out.json"
    result = run(out, "-k", "test_philox", MVD_GPU_ON_CPU="1")
    found = json.loads(out.read_text())
    assert result.returncode == 0, result.stdout
    assert found["tests"]["total"] == {"passed": 3, "failed": 0, "skipped": 0}
    assert found["machine"]["torch"] == torch.__version__
    assert found["rows"] == []


def test_the_engines_tests_for_a_gpu_run_there(monkeypatch, capsys):
    monkeypatch.syspath_prepend(SCRIPT.parent)
    monkeypatch.chdir(SCRIPT.parents[1])
    import gpu_run

    chosen = gpu_run.test_files()
    marked = {"tests/test_ahead.py", "tests/test_launch.py"}
    assert marked <= {file for file, arguments in chosen.items() if arguments == ["-m", "gpu"]}
    assert chosen["tests/test_attention.py"] == [] and "tests/test_training.py" not in chosen
    monkeypatch.setattr(gpu_run, "find_spec", lambda name: None)
    assert not marked & set(gpu_run.test_files())
    assert "left out, as pydantic is not installed here: tests/test_ahead.py" in capsys.readouterr().out


def test_results_of_a_report(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(SCRIPT.parent)
    import gpu_run

    report = tmp_path / "report.xml"
    assert gpu_run.results(report, finished=False) == {"passed": 0, "failed": 0, "skipped": 0, "failures": {}}
    cases = ('<failure message="because"/>', "<skipped/>", "", '<error message="broken"/>', "")
    inside = "".join(f'<testcase name="test_{i}">{case}</testcase>' for i, case in enumerate(cases))
    report.write_text(f"<testsuites><testsuite>{inside}</testsuite></testsuites>")
    found = gpu_run.results(report, finished=True)
    failures = {"test_0": "because", "test_3": "broken"}
    assert found == {"passed": 2, "failed": 2, "skipped": 1, "failures": failures}
    assert gpu_run.results(report, finished=False)["passed"] == 1


def test_what_takes_too_long_is_not_well(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPT.parent)
    import gpu_run

    monkeypatch.setattr(gpu_run, "GRACE", 1)
    deaf = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print(flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", deaf], stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        assert not gpu_run.wait(process, 0.1)
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        assert gpu_run.wait(process, 60)
    assert gpu_run.is_well({"finished": True, "exit": 0})
    assert not gpu_run.is_well({"finished": False, "exit": 0})
    assert not gpu_run.is_well({"finished": True, "exit": 1})
