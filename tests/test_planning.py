"""The plan against what was measured: state on two CPU ranks, a step on an H100; and its command line."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import tiny_runs
import torch

from mvd_fast import cli
from mvd_fast.config.load import list_recipes, load_config
from mvd_fast.tools.plan import step_time
from mvd_fast.tools.plan.dry_run import LiveBytes, StepBytes, step_bytes, task_without_memory
from mvd_fast.tools.plan.gpus import GPUS, MEASURED
from mvd_fast.tools.plan.memory import count_parameters, state_bytes
from mvd_fast.tools.plan.plan import Plan, count_clips

ROOT = Path(__file__).parents[1]
STEP = json.loads((ROOT / MEASURED.file).read_text())
SECONDS = next(side for side in STEP["sides"] if side["side"] == "engine exact")
CASES = ("0-bf16-1", "1-bf16-1", "2-bf16-1", "3-bf16-1", "1-bf16-2")  # stage, precision, accumulation


def make_plan(name: str, gpus: int, *settings: str, **options: object) -> Plan:
    return Plan(load_config(name, settings), GPUS["h100"], gpus, 240_000, "--clips", **options)


def test_state_is_what_two_cpu_ranks_hold(tmp_path: Path) -> None:
    """Weights, masters, moments and gradients within 1 %: buckets and a few indices are in the measurement, too."""
    content = tiny_runs.config(tmp_path, tmp_path / "run")
    small = {"reduce_bucket_size": 1000, "stage3_prefetch_bucket_size": 1000, "stage3_max_live_parameters": 1000}
    content["deepspeed"]["zero_optimization"] |= small
    config_file, out = tiny_runs.write_config(tmp_path / "c.json", content), tmp_path / "out.json"
    command = [sys.executable, str(Path(__file__).with_name("state_worker.py")), str(config_file), str(out), *CASES]
    for rank in tiny_runs.start_ranks(command):
        status, output = tiny_runs.finish(rank)
        assert status == 0, output
    for case, measured in json.loads(out.read_text()).items():
        stage, precision, accumulation = case.split("-")
        config = load_config(str(config_file), [f'precision="{precision}"'])
        counts = count_parameters(task_without_memory(config).network)
        state = state_bytes(config, *counts, int(stage), 2, int(accumulation))
        assert state.resident == pytest.approx(measured, rel=0.01), case


def test_activations_are_what_the_h100_allocated() -> None:
    """Within 5 % of the measured step's peak, for as many clips; kernels' scratch memory is not in the dry run."""
    dry = step_bytes(load_config("vitb_from_vitb"), STEP["clips"])
    assert dry.kept < dry.peak
    assert dry.peak == pytest.approx(SECONDS["temporary_bytes"], rel=0.05)


def test_live_bytes_counts_what_is_there() -> None:
    known = torch.empty(100)
    with LiveBytes([known]) as held:
        first = torch.empty(1000, dtype=torch.float32)
        second = first.view(10, 100)[2:]  # no memory of its own
        third = known + 1.0
        assert held.live == 4000 + 400
        del first, second
        assert held.live == 400
        third.add_(1.0)
    assert held.live == 400 and held.peak == 4400


def test_activation_checkpointing_keeps_less() -> None:
    small = [f"model.{name}={value}" for name, value in tiny_runs.ENCODER.items()]
    small += [f"decoder.{name}={value}" for name, value in tiny_runs.DECODER.items()]
    small += [
        f"targets.{role}.{name}={value}" for role in ("image", "video") for name, value in tiny_runs.ENCODER.items()
    ]
    small += ["model.depth=8", "model.num_frames=8", "batch.size=4"]
    plain, recomputed = (
        step_bytes(load_config("vitb_from_vitb", [*small, f"model.activation_checkpointing={flag}"]), 2)
        for flag in ("false", "true")
    )
    assert recomputed.kept < 0.5 * plain.kept and recomputed.peak < plain.peak


def test_constants_are_the_measurements() -> None:
    """What is copied from the result file, and what belongs to its config."""
    seconds, task = SECONDS["seconds"], task_without_memory(load_config(STEP["config"]))
    assert (MEASURED.samples, MEASURED.peak) == (STEP["clips"], pytest.approx(STEP["peaks"]["run"], rel=1e-3))
    assert MEASURED.step == pytest.approx(seconds["total"], rel=1e-3)
    assert MEASURED.teachers == pytest.approx(seconds["image teacher"] + seconds["video teacher"], rel=1e-3)
    parts = seconds["student"] + seconds["decoders"] + seconds["heads and loss"]
    assert MEASURED.forward == pytest.approx(parts, rel=1e-3)
    assert MEASURED.backward == pytest.approx(seconds["backward"], rel=1e-3)
    assert MEASURED.optimiser == pytest.approx(seconds["optimiser"], rel=1e-3)
    flop = step_time.flop_by_phase(task, load_config(STEP["config"]))
    assert sum(flop.values()) == pytest.approx(task.flops().step)
    teachers = flop["image teacher"] + flop["video teacher"]
    assert teachers == pytest.approx(step_time.MEASURED_TEACHER_FLOP, rel=1e-3)
    assert count_parameters(task.network)[0] == pytest.approx(step_time.MEASURED_PARAMETERS, rel=1e-3)


def test_the_measured_step_is_predicted_and_larger_work_is_not_launch_bound() -> None:
    measured = make_plan("vitb_from_vitb", 1, "batch.size=16", "deepspeed.zero_optimization.stage=0")
    assert measured.step_seconds == pytest.approx(SECONDS["seconds"]["total"], rel=0.1)
    large = make_plan("vitb_from_vitb", 1, "batch.size=256", "deepspeed.zero_optimization.stage=0")
    assert measured.phases[-2].limit == "kernel launches" and large.phases[-2].limit == "arithmetic"
    assert large.step_seconds < 16 * measured.step_seconds
    known = make_plan("vitb_from_vitb", 1, "batch.size=256", share=0.5)
    assert known.phases[0].seconds == pytest.approx(256 * known.config.model.grid[0] * 35e9 / 494.5e12, rel=0.02)


@pytest.mark.parametrize(
    "recipe",
    [
        ('targets.image.precision="int8"', 'targets.video.precision="int8"'),
        ("mask.per_clip=2", "mask.predict_fraction=0.5"),
        ('teachers.cache.path="store"',),
        ("teachers.compile=true",),
        ("teachers.prefetch=true",),
    ],
)
def test_recipes_are_planned_whole(recipe: tuple[str, ...]) -> None:
    """The dry run goes through them, and 8-bit teachers are networks of as many parameters in half of the memory."""
    small = ("batch.size=8", "model.num_frames=4", *recipe)
    plain, less = make_plan("vits_from_vitb", 2, *small[:2]), make_plan("vits_from_vitb", 2, *small)
    found = [{figure.figure: figure.value for figure in plan.figures()} for plan in (plain, less)]
    assert less.step.peak > 0
    if "int8" in recipe[0]:
        name = "image teacher's parameters"
        assert found[1][name] == pytest.approx(found[0][name], rel=1e-3)
        assert found[1]["teachers"] == pytest.approx(found[0]["teachers"] / 2, rel=0.05)
    elif "compile" in recipe[0]:
        assert found[1] == found[0]
    elif "prefetch" in recipe[0]:
        more = {name: found[1][name] - found[0][name] for name in ("kept for backward", "activations, at most")}
        targets = less.batch[0] * 2 * 14 * 14 * (768 + 768) * 2 / 1e9  # this batch's, bf16, which the step holds
        assert more["kept for backward"] == pytest.approx(targets, rel=1e-6)
        assert more["activations, at most"] > targets, "the next batch's, and what their teachers take"
    else:
        assert found[1]["step"] < found[0]["step"]


@pytest.mark.parametrize("name", list_recipes())
def test_every_recipe_has_a_plan(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All figures but the dry run's; that one is done for other networks above."""
    config = load_config(name)
    monkeypatch.setattr("mvd_fast.tools.plan.plan.step_bytes", lambda *_: StepBytes(kept=1 << 30, peak=2 << 30))
    figures = Plan(config, GPUS["a100"], 16, 5000, "--clips").figures()
    assert all(figure.source and figure.kind for figure in figures)
    values = {(figure.section, figure.figure): figure.value for figure in figures}
    assert values["the whole run", "GPU-hours"] == pytest.approx(16 * 24 * values["the whole run", "time"])
    assert (("target store", "size") in values) == (config.task == "distill")


def test_what_fits_grows_with_the_stage_and_shrinks_the_micro_batch() -> None:
    plan = make_plan("vitb_from_vitb", 8)
    plan.__dict__["step"] = StepBytes(kept=25 << 30, peak=26 << 30)  # of the 128 samples that it has, about
    peaks = [plan.peak_bytes(stage) for stage in (0, 1, 2)]
    assert plan.state(3).resident < plan.state(2).resident < plan.state(0).resident and min(peaks) > 0
    assert plan.peak_bytes(1) < plan.room and plan.largest_micro(1) == 128
    tight = dataclasses.replace(plan, gpu=dataclasses.replace(plan.gpu, memory_gb=20))
    tight.__dict__["step"] = plan.step
    assert tight.largest_micro(1) == 64
    smaller = dataclasses.replace(plan, gpu=dataclasses.replace(plan.gpu, memory_gb=1))
    smaller.__dict__["step"] = plan.step
    assert smaller.largest_micro(3) == 0


def test_a_decoder_that_is_too_slow_is_the_bottleneck() -> None:
    fast, slow = (make_plan("vitb_from_vitb", 8, share=0.4, decode_fps=rate) for rate in (1e6, 1000.0))
    values = []
    for plan in (fast, slow):
        plan.__dict__["step"] = StepBytes(kept=1, peak=1)
        values.append({figure.figure: figure.value for figure in plan.figures()})
    assert fast.waiting == 1.0 and values[0]["bottleneck"] == "video teacher"
    assert values[1]["bottleneck"] == "decoding"
    assert slow.waiting == pytest.approx(128 * 61 / 1000.0 / slow.step_seconds)
    assert values[1]["time"] == pytest.approx(slow.waiting * values[0]["time"])


def test_dataset_sizes(tmp_path: Path) -> None:
    config = load_config("vitb_from_vitb", ['data.train="somewhere/ssv2/train.txt"'])
    assert count_clips(config, None)[0] == 168_913 and count_clips(config, 7) == (7, "--clips")
    listed = tmp_path / "list.txt"
    listed.write_text("a.mp4 0\n\nb.mp4 1\n")
    assert count_clips(load_config("vitb_from_vitb", [f'data.train="{listed}"']), None)[0] == 2


def test_the_command_writes_every_figure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "made" / "plan.json"
    assert cli.main(["plan", "--config", "mae_vits", "--gpus", "8", "--json", str(out)]) == 0
    printed = capsys.readouterr().out
    figures = json.loads(out.read_text())["figures"]
    assert all(figure["figure"] in printed for figure in figures)
    assert {"counted", "predicted", "measured"} <= {figure["kind"] for figure in figures}
    assert all(figure["source"] for figure in figures)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--gpus", "8", "--gpu", "h1000"], "--gpu: 'h1000' is unknown; there are: a100-40gb, a100, h100"),
        (["--gpus", "7"], "batch.size 1024 is not a multiple of 7 ranks"),
        (["--gpus", "8", "--set", 'data.train="my/list.txt"'], "say how many samples there are: --clips N"),
        (["--gpus", "8", "--clips", "5"], "--clips: 5 are less than one step of 1024"),
    ],
)
def test_errors_are_one_sentence(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mvd_fast.tools.plan.plan.step_bytes", lambda *_: StepBytes(kept=1, peak=1))
    assert cli.main(["plan", "--config", "vitb_from_vitb", *arguments]) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1


@pytest.mark.parametrize("name", ["demo/finetune", "demo/ava", "demo/video_teacher", "demo/image_teacher"])
def test_every_task_is_counted_by_a_dry_run(name: str) -> None:
    """What a step keeps for backward grows with the batch, but for what does not depend on it."""
    config = load_config(name)
    small, large = step_bytes(config, 4), step_bytes(config, 8)
    assert 0 < small.kept <= small.peak and 1.5 * small.kept < large.kept <= 2 * small.kept


@pytest.mark.parametrize("arguments", [["--gpus", "0"], ["--gpus", "8", "--share-of-peak", "40"]])
def test_numbers_out_of_range_are_refused(arguments: list[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["plan", "--config", "vitb_from_vitb", *arguments])
