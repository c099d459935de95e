"""What GPUs are said to do, and what one of them was measured to do."""

from __future__ import annotations

from dataclasses import dataclass

from mvd_fast.config.base import ConfigError

# NVIDIA's count of H.264 1080p streams at 30 frames a second that one GPU's engines decode together.
STREAM_FPS = 30


@dataclass(frozen=True)
class Gpu:
    """Published figures of one GPU; rates are dense (without sparsity)."""

    title: str
    tflops_bf16: float
    tflops_fp32: float
    memory_gb: float  # 1e9 bytes
    memory_gb_s: float
    link_gb_s: float  # to the other GPUs of a machine, one direction
    nvdec_engines: int
    h264_streams: int | None  # 1080p30, all engines together; None: no figure published that we know of
    source: str

    @property
    def decode_fps(self) -> float | None:
        """H.264 1080p frames a second, all engines together."""
        return None if self.h264_streams is None else self.h264_streams * STREAM_FPS


_SITE = "https://www.nvidia.com/en-us/data-center"
GPUS = {
    "a100-40gb": Gpu("A100 SXM 40 GB", 312, 19.5, 40, 1555, 300, 5, 75, f"{_SITE}/a100/"),
    "a100": Gpu("A100 SXM 80 GB", 312, 19.5, 80, 2039, 300, 5, 75, f"{_SITE}/a100/"),
    "h100": Gpu("H100 SXM 80 GB", 989, 67, 80, 3350, 450, 7, 170, f"{_SITE}/h100/"),
    "h200": Gpu("H200 SXM 141 GB", 989, 67, 141, 4800, 450, 7, 170, f"{_SITE}/h200/"),
    "l40s": Gpu("L40S 48 GB", 362, 91.6, 48, 864, 32, 3, None, f"{_SITE}/l40s/"),
}
DECODE_SOURCE = "NVIDIA's architecture whitepapers of A100 and H100: H.264 1080p30 streams"

# Between machines, a GPU's share, one direction: one 400 Gbit/s adapter for each GPU, as in NVIDIA's DGX H100.
NETWORK_GB_S = 50.0
GPUS_PER_MACHINE = 8


def find_gpu(name: str) -> Gpu:
    """Raises ConfigError, which lists the known ones."""
    if name.lower() not in GPUS:
        raise ConfigError(f"--gpu: {name!r} is unknown; there are: {', '.join(GPUS)}")
    return GPUS[name.lower()]


@dataclass(frozen=True)
class Measurement:
    """One run of `mvd-fast bench step`, from which predictions for other sizes and cards are made.

    ViT-B from ViT-B, 16 clips, bf16, torch 2.11, H100 SXM 80 GB; row `engine exact`.
    """

    file: str = "benchmarks/results/step_h100.json"
    gpu: str = "h100"
    samples: int = 16
    peak: float = 745.7e12  # FLOP/s of torch's bf16 matrix product
    step: float = 0.1002  # seconds, and of it:
    teachers: float = 0.012062 + 0.013302
    forward: float = 0.014082 + 0.005839 + 0.001466
    backward: float = 0.037196
    optimiser: float = 0.007142
    temporary_bytes: float = 3.605e9  # allocated by the step at most


MEASURED = Measurement()
