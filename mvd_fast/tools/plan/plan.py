"""`mvd-fast plan`: what a run will take on GPUs that need not be there, each figure with where it comes from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from mvd_fast.config.base import ConfigError
from mvd_fast.config.checks import check_batch
from mvd_fast.config.run import RunConfig
from mvd_fast.data.lists import read_dataset
from mvd_fast.target_store.store import layout
from mvd_fast.tasks import Task
from mvd_fast.tasks.distill import Config
from mvd_kernels import Linear8bit

from .dry_run import StepBytes, step_bytes, task_without_memory
from .figures import Figure
from .gpus import DECODE_SOURCE, GPUS, MEASURED, NETWORK_GB_S, Gpu
from .memory import StateBytes, count_parameters, input_bytes, peak_bytes, state_bytes, teacher_bytes
from .step_time import LARGE_WORK_SHARE, REACHED_OF_PUBLISHED, Phase, flop_by_phase, phases

# Training samples of the sets that the recipes name, recognised by a part of `data.train`.
DATASETS = {
    "k400": ("Kinetics-400, about, as many videos are gone", 240_000),
    "ssv2": ("Something-Something v2", 168_913),
    "imagenet": ("ImageNet-1k", 1_281_167),
}

# Of a GPU's memory, left to CUDA, NCCL, DALI's decoder and gaps between allocations: an assumption.
RESERVED = 0.1


@dataclass(frozen=True)
class Plan:
    """One config on so many GPUs. `share`: of the published peak; None: from the measured step."""

    config: RunConfig
    gpu: Gpu
    gpus: int
    clips: int
    clips_source: str
    share: float | None = None
    network_gb_s: float = NETWORK_GB_S
    decode_fps: float | None = None

    @cached_property
    def batch(self) -> tuple[int, int]:
        """(micro batch, accumulation). Raises ConfigError where the batch does not divide."""
        return check_batch(self.config, self.gpus)

    @cached_property
    def task(self) -> Task:
        return task_without_memory(self.config)

    @cached_property
    def counts(self) -> tuple[int, int]:
        return count_parameters(self.task.network)

    @cached_property
    def step(self) -> StepBytes:
        return step_bytes(self.config, self.batch[0])

    @cached_property
    def teacher_bytes(self) -> int:
        return teacher_bytes(self.task)

    @cached_property
    def inputs(self) -> float:
        return input_bytes(self.config, self.batch[0])

    def state(self, stage: int) -> StateBytes:
        return state_bytes(self.config, *self.counts, stage, self.gpus, self.batch[1])

    def peak_bytes(self, stage: int, micro: float | None = None) -> float:
        """The most that one GPU holds, with micro batches of `micro` samples; activations are proportional to it."""
        scale = 1.0 if micro is None else micro / self.batch[0]
        return peak_bytes(self.state(stage), self.step.peak * scale, self.teacher_bytes + self.inputs * scale)

    @property
    def room(self) -> float:
        return self.gpu.memory_gb * 1e9 * (1 - RESERVED)

    def largest_micro(self, stage: int) -> int:
        """The largest micro batch that divides a rank's samples of a step and fits; 0: none does."""
        per_rank, masks = self.config.batch.size // self.gpus, self.config.request.samples
        fitting = (n for n in range(masks, per_rank + 1, masks) if per_rank % n == 0)
        return max((n for n in fitting if self.peak_bytes(stage, n) <= self.room), default=0)

    @cached_property
    def phases(self) -> list[Phase]:
        settings = (self.gpu, self.gpus, self.config.zero_stage, *self.batch, self.share, self.network_gb_s)
        return phases(self.task, self.config, *settings)

    @property
    def step_seconds(self) -> float:
        """Of one step, without waiting for data."""
        return sum(phase.seconds for phase in self.phases)

    @property
    def clips_per_step(self) -> int:
        return int(self.config.clips_per_step)

    @property
    def frames(self) -> int:
        """From a clip's first frame to its last: what a decoder has to go through."""
        return self.config.data.span(self.config.request.num_frames)

    @property
    def decodes(self) -> bool:
        """Whether samples come from videos."""
        return self.config.data.files == "videos"

    @property
    def nvdec(self) -> float | None:
        """Frames a second of one GPU, if known."""
        return self.gpu.decode_fps if self.decode_fps is None else self.decode_fps

    @property
    def waiting(self) -> float:
        """How many times longer steps take because NVDEC does not keep up; 1: it does, or its rate is not known."""
        if not self.decodes or self.nvdec is None:
            return 1.0
        decoding = self.clips_per_step / self.gpus * self.frames / self.nvdec
        return max(1.0, decoding / self.step_seconds)

    @property
    def steps(self) -> int:
        clips = self.clips_per_step
        if clips > self.clips:
            raise ConfigError(f"--clips: {self.clips} are less than one step of {clips}; lower batch.size")
        return self.config.optim.epochs * (self.clips // clips)

    # ---- figures, by section ----

    def figures(self) -> list[Figure]:
        parts = (self._network, self._memory, self._time, self._decoding, self._run, self._store)
        return [figure for part in parts for figure in part()]

    def _network(self) -> Iterator[Figure]:
        trained, frozen = self.counts
        built = "the run's own network, built without memory"
        yield Figure("network", "trained parameters", trained / 1e6, "M", "counted", built)
        yield Figure("network", "frozen position tables", frozen / 1e6, "M", "counted", built)
        for title, network in self.task.frozen().items():
            quantized = [module for module in network.modules() if isinstance(module, Linear8bit)]
            held = [*network.parameters(), *(part for one in quantized for part in (one.weight, one.bias))]
            size = sum(part.numel() for part in held) / 1e6
            yield Figure("network", f"{title.replace('_', ' ')}'s parameters", size, "M", "counted", built)
        how = "the task's own count, multiply-adds as 2; equal to torch's FlopCounterMode in tests/test_flops.py"
        for name, flop in flop_by_phase(self.task, self.config).items():
            again = name == "backward" and self.config.model.activation_checkpointing
            source = "3 x forward: activation checkpointing runs it again" if again else how
            yield Figure("FLOP per clip", name, flop / 1e9, "GFLOP", "counted", source)
        total = sum(flop_by_phase(self.task, self.config).values()) / 1e9
        yield Figure("FLOP per clip", "training step", total, "GFLOP", "counted", "the sum")

    def _memory(self) -> Iterator[Figure]:
        section, micro = "memory per GPU", self.batch[0]
        dry = "a dry run of forward and backward on tensors without memory"
        reads = f"{dry}; the same way of counting is 3 % below what an H100 measured ({MEASURED.file})"
        yield Figure(
            section, "micro batch", micro, "samples", "given", f"batch.size / ({self.gpus} GPUs x accumulation)"
        )
        yield Figure(section, "teachers", self.teacher_bytes / 1e9, "GB", "counted", "their weights and tables")
        yield Figure(section, "batches of clips", self.inputs / 1e9, "GB", "predicted", "pixels in float32, prefetched")
        yield Figure(section, "kept for backward", self.step.kept / 1e9, "GB", "counted", dry)
        yield Figure(section, "activations, at most", self.step.peak / 1e9, "GB", "predicted", reads)
        for stage in range(4):
            state = self.state(stage)
            held = (
                f"weights {state.weights / 1e9:.3g}, masters {state.masters / 1e9:.3g}, moments "
                f"{state.moments / 1e9:.3g}, gradients {state.gradients / 1e9:.3g}; the rules are checked within 1 % "
                "against two CPU ranks in tests/test_planning.py"
            )
            yield Figure(section, f"ZeRO {stage}: state", state.resident / 1e9, "GB", "counted", held)
            extra = state.buckets + state.gathered
            if extra:
                what = (
                    f"reduce_bucket_size {state.buckets / 1e9:.3g}, gathered weights up to {state.gathered / 1e9:.3g}"
                )
                yield Figure(section, f"ZeRO {stage}: buffers", extra / 1e9, "GB", "predicted", what)
            largest = self.largest_micro(stage)
            fits = "fits" if self.peak_bytes(stage) <= self.room else "does not fit"
            source = (
                f"{fits} {self.gpu.memory_gb:g} GB less {RESERVED:.0%} (assumed); largest micro batch: "
                f"{largest or 'none'}"
            )
            asked = ", as asked" if stage == self.config.zero_stage else ""
            yield Figure(
                section, f"ZeRO {stage}: in all{asked}", self.peak_bytes(stage) / 1e9, "GB", "predicted", source
            )

    def _time(self) -> Iterator[Figure]:
        section = "one step"
        if self.share is None:
            source = (
                f"{LARGE_WORK_SHARE:.0%} (teachers of the step measured on an {GPUS[MEASURED.gpu].title}, "
                f"{MEASURED.samples} clips, {MEASURED.file}) of the {REACHED_OF_PUBLISHED:.0%} of the published "
                "peak that torch's matrix product reached there"
            )
            kind = "measured" if self.gpu is GPUS[MEASURED.gpu] else "predicted"
            yield Figure(section, "share of peak", 100 * LARGE_WORK_SHARE * REACHED_OF_PUBLISHED, "%", kind, source)
        else:
            yield Figure(section, "share of peak", 100 * self.share, "%", "given", "--share-of-peak")
        for phase in self.phases:
            yield Figure(section, phase.name, 1e3 * phase.seconds, "ms", "predicted", f"{phase.limit}: {phase.work}")
        yield Figure(
            section, "step", 1e3 * self.step_seconds, "ms", "predicted", "the sum: nothing is taken to overlap"
        )
        slowest = max(self.phases, key=lambda phase: phase.seconds)
        name, why = slowest.name, f"{slowest.seconds / self.step_seconds:.0%} of the step, limited by {slowest.limit}"
        if self.waiting > 1.0:
            name, why = "decoding", f"it takes {self.waiting:.2g} times as long as the step; see below"
        yield Figure(section, "bottleneck", name, "", "predicted", why)

    def _decoding(self) -> Iterator[Figure]:
        section, clips = "decoding", self.clips_per_step / self.gpus / self.step_seconds
        yield Figure(section, "clips needed", clips, "/s/GPU", "predicted", "batch.size / GPUs / step")
        if not self.decodes:
            return
        source = "first to last frame; seeking comes on top"
        yield Figure(section, "frames of a clip", self.frames, "frames", "counted", source)
        needed = clips * self.frames
        yield Figure(section, "frames needed", needed, "/s/GPU", "predicted", "clips x frames of a clip")
        rate, source, kind = self.nvdec, f"{self.gpu.nvdec_engines} engines; {DECODE_SOURCE}", "published"
        if self.decode_fps is not None:
            source, kind = "--decode-fps", "given"
        if rate is None:
            yield Figure(section, "NVDEC", "unknown", "", kind, "no figure known; give it with --decode-fps")
            return
        yield Figure(section, "NVDEC", float(rate), "/s/GPU", kind, source)
        enough = "it keeps up" if self.waiting == 1.0 else f"steps take {self.waiting:.2g} times as long"
        source = f"{enough}; a rate published for 1080p, smaller videos need less"
        yield Figure(section, "NVDEC in use", 100 * needed / rate, "%", "predicted", source)

    def _run(self) -> Iterator[Figure]:
        section, config = "the whole run", self.config
        known = "given" if self.clips_source == "--clips" else "published"
        if Path(config.data.train).is_file():
            known = "counted"
        yield Figure(section, "training samples", self.clips, "", known, self.clips_source)
        source = f"{config.optim.epochs} epochs of {self.steps // config.optim.epochs}"
        yield Figure(section, "steps", self.steps, "", "counted", source)
        seconds = self.steps * self.step_seconds * self.waiting
        how = "steps x time of one" + ("" if self.waiting == 1.0 else f" x {self.waiting:.2g}, waiting for NVDEC")
        yield Figure(section, "time", seconds / 86400, "days", "predicted", f"{how}; no restarts")
        yield Figure(section, "GPU-hours", seconds / 3600 * self.gpus, "h", "predicted", f"time x {self.gpus} GPUs")

    def _store(self) -> Iterator[Figure]:
        if not isinstance(self.config, Config):
            return
        shapes = layout(self.config, self.clips)
        widths = " + ".join(map(str, shapes.channels.values()))
        source = f"{self.clips:,} samples x {shapes.views} views x {shapes.tokens} tokens x ({widths}) channels, 8 bits"
        yield Figure("target store", "size", shapes.bytes / 1e12, "TB", "predicted", source)


def count_clips(config: RunConfig, given: int | None) -> tuple[int, str]:
    """(training samples, from what): given, lines of the list if it is there, or the known size of a named set."""
    if given is not None:
        return given, "--clips"
    train = Path(config.data.train)
    if train.is_file():
        return len(read_dataset(str(train), config.data.root)), f"lines of {config.data.train}"
    for part, (title, size) in DATASETS.items():
        if part in str(train).lower():
            return size, f"{title}; data.train is {config.data.train}"
    raise ConfigError(
        f"data.train: {config.data.train} is not there and names no set of known size ({', '.join(DATASETS)}); say how "
        "many samples there are: --clips N"
    )
