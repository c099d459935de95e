"""Tube masks: the published generator, the definition, and equality of all implementations bit by bit."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from op_checks import CPP, IMPLEMENTATIONS, pairwise, running

import mvd_kernels
from mvd_kernels import TubeMask, masked_per_slice, tube_mask, use_impl
from mvd_kernels.tube_mask import _philox, _reference

FACTS = json.loads((Path(__file__).parent / "data" / "recipe_facts.json").read_text())["tube_masks"]
GRID = (8, 14, 14)
WORD = 0xFFFFFFFF
SAMPLES = torch.tensor([0, 1, 5, 2**32 - 1, 2**32, 2**40 + 3, -7, 2**63 - 1])
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def draw(impl: str, *args, **kwargs) -> TubeMask:
    with use_impl(impl):
        return tube_mask(*args, **kwargs)


def assert_equal(got: TubeMask, want: TubeMask) -> None:
    for name, ours, theirs in zip(TubeMask._fields, got, want, strict=True):
        assert ours.dtype == theirs.dtype, name
        assert ours.shape == theirs.shape, name
        assert torch.equal(ours.cpu(), theirs.cpu()), name


# ---- the generator and the definition ----


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((WORD,) * 4, (WORD, WORD), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_published_words(counter, key, words):
    got = _philox([torch.tensor([word]) for word in counter], key)
    assert tuple(int(word) for word in got) == words


def python_mask(seed: int, epoch: int, sample: int, positions: int, count: int) -> list[bool]:
    """The definition once more, in Python's unbounded integers."""

    def key(position: int) -> int:
        x = [position, sample & WORD, sample >> 32 & WORD, epoch]
        k = [seed & WORD, seed >> 32]
        for _ in range(10):
            even, odd = x[0] * 0xD2511F53, x[2] * 0xCD9E8D57
            x = [odd >> 32 ^ x[1] ^ k[0], odd & WORD, even >> 32 ^ x[3] ^ k[1], even & WORD]
            k = [k[0] + 0x9E3779B9 & WORD, k[1] + 0xBB67AE85 & WORD]
        return x[0] | x[1] << 32

    chosen = set(sorted(range(positions), key=lambda p: (key(p), p))[:count])
    return [p in chosen for p in range(positions)]


@pytest.mark.parametrize("seed", [0, 2**62 + 12345])
def test_reference_is_the_definition(seed):
    got = draw("reference", seed, 2**32 - 1, SAMPLES, (2, 7, 5), 0.6)
    want = [python_mask(seed, 2**32 - 1, sample % 2**64, 35, 21) for sample in SAMPLES.tolist()]
    assert got.mask[:, :35].tolist() == want


# ---- all implementations agree ----

CASES = [
    (GRID, 0.9),
    ((4, 7, 5), 0.75),
    ((1, 1, 1), 0.5),
    ((2, 1, 3), 0.34),
    ((3, 16, 16), 0.5),  # exactly a power of two
    ((1, 3, 11), 0.0),
    ((1, 3, 11), 1.0),
]


@pairwise(implementation=IMPLEMENTATIONS, case=CASES, start=[(0, 0), (2**62 + 12345, 2**32 - 1)])
def test_implementations_equal_the_reference(implementation, case, start):
    want = draw("reference", *start, SAMPLES, *case)
    with running(implementation) as device:
        assert_equal(tube_mask(*start, SAMPLES, *case, device=device), want)


@pytest.mark.parametrize("implementation", CPP)
def test_every_number_of_positions_and_masks(implementation):
    """Ends of vectors: slices of 1 to 20 positions, everything from none to all of them masked."""
    for positions in range(1, 21):
        for masked in range(positions + 1):
            arguments = (7, 3, SAMPLES, 2, positions, masked)
            want = TubeMask(*_reference(*arguments))
            with running(implementation):
                assert_equal(TubeMask(*torch.ops.mvd_kernels.tube_mask(*arguments)), want)


@pytest.mark.parametrize("implementation", CPP)
@pytest.mark.parametrize("keys", ["few", "one", "zero", "largest", "neighbours", "signs"])
def test_equal_keys_are_masked_in_order_of_position(implementation, keys):
    """Philox's 64-bit keys are hardly ever equal, so keys are handed in: unsigned, as int64 bits."""
    generator = np.random.default_rng(0)
    positions = 37
    key_bp = {
        "few": lambda: generator.integers(4, size=(50, positions)) << 61,
        "one": lambda: np.full((2, positions), 2**40 + 1),
        "zero": lambda: np.zeros((2, positions), np.int64),
        "largest": lambda: np.full((2, positions), -1),
        "neighbours": lambda: generator.integers(3, size=(50, positions)) + 2**50,
        "signs": lambda: generator.integers(-2, 2, size=(50, positions)),
    }[keys]()
    order_bp = key_bp.astype(np.int64).view(np.uint64).argsort(1, kind="stable")
    for masked in range(positions + 1):
        want = np.zeros(key_bp.shape, bool)
        np.put_along_axis(want, order_bp[:, :masked], True, 1)
        with running(implementation):
            got = torch.ops.mvd_kernels.tube_mask_of_keys_cpp(torch.from_numpy(key_bp), masked)
        assert torch.equal(got, torch.from_numpy(want)), masked


@pytest.mark.parametrize("impl", ["reference", "cpp", "triton"])
def test_empty_batch_and_strided_samples(impl):
    device = DEVICE if impl == "triton" else "cpu"
    empty = draw(impl, 0, 0, SAMPLES[:0], GRID, 0.9, device=device)
    assert [tuple(part.shape) for part in empty] == [(0, 1568), (0, 160), (0, 1408)]
    every_other = torch.arange(10, device=device)[::2]
    assert_equal(draw(impl, 0, 0, every_other, GRID, 0.9), draw("reference", 0, 0, every_other.clone(), GRID, 0.9))


def test_cpp_does_not_depend_on_the_batch_or_the_threads():
    numbers = torch.arange(100)
    together = draw("cpp", 3, 1, numbers, GRID, 0.9).mask
    alone = torch.cat([draw("cpp", 3, 1, number[None], GRID, 0.9).mask for number in numbers])
    assert torch.equal(together, alone)


# ---- what a mask is ----


@pytest.mark.parametrize("fact", FACTS, ids=lambda fact: f"{fact['grid']}-{fact['ratio']}")
def test_counts_of_the_recipes(fact):
    grid = tuple(fact["grid"])
    masks = tube_mask(0, 0, torch.arange(3), grid, fact["ratio"])
    per_slice = masks.mask.view(3, grid[0], -1).sum(-1)
    assert masked_per_slice(grid, fact["ratio"]) == fact["masked_per_slice"]
    assert per_slice.unique().tolist() == [fact["masked_per_slice"]]
    assert masks.visible.shape[1] == fact["visible_total"]


def test_tubes_and_indices():
    masks = tube_mask(1, 2, torch.arange(16), GRID, 0.9)
    slices = masks.mask.view(16, 8, 196)
    assert torch.equal(slices, slices[:, :1].expand_as(slices))
    for mask, visible, masked in zip(*masks, strict=True):
        assert torch.equal(visible, (~mask).nonzero()[:, 0])
        assert torch.equal(masked, mask.nonzero()[:, 0])


def test_every_position_is_masked_equally_often():
    batch = 4096
    counts = tube_mask(0, 0, torch.arange(batch), (1, 14, 14), 0.9).mask.sum(0).double()
    share = 176 / 196
    deviation = (counts - batch * share) / (batch * share * (1 - share)) ** 0.5
    assert deviation.abs().max() < 5
    assert 0.8 < deviation.std() < 1.2


@pytest.mark.parametrize("change", ["epoch", "sample", "seed"])
def test_masks_of_neighbours_are_independent(change):
    batch, visible = 4096, 20
    numbers = torch.arange(batch)
    first = tube_mask(0, 0, numbers, (1, 14, 14), 0.9).mask
    second = {
        "epoch": lambda: tube_mask(0, 1, numbers, (1, 14, 14), 0.9).mask,
        "sample": lambda: first.roll(1, 0),
        "seed": lambda: tube_mask(1, 0, numbers, (1, 14, 14), 0.9).mask,
    }[change]()
    both = (~first & ~second).sum(1).double()
    # Hypergeometric: of the 20 visible positions, how many are among another 20 of 196.
    mean = visible * visible / 196
    variance = mean * (1 - visible / 196) * (196 - visible) / 195
    assert abs(both.mean() - mean) < 5 * (variance / batch) ** 0.5
    assert abs(both.var() / variance - 1) < 0.15


# ---- torch ----


@pytest.mark.cpp
def test_opcheck():
    with use_impl("cpp"):
        torch.library.opcheck(torch.ops.mvd_kernels.tube_mask.default, (1, 2, SAMPLES, 8, 196, 176))


def test_compiles_into_one_graph():
    def masks(epoch: int, samples: torch.Tensor) -> TubeMask:
        return tube_mask(3, epoch, samples, GRID, 0.9)

    compiled = torch.compile(masks, fullgraph=True)
    for epoch in range(3):
        assert_equal(compiled(epoch, SAMPLES), masks(epoch, SAMPLES))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_cuda_tensors_use_triton():
    assert mvd_kernels.implementation("tube_mask", "cuda")[0] == "triton"
    masks = tube_mask(1, 2, SAMPLES, GRID, 0.9, device="cuda")
    assert masks.mask.is_cuda
    assert_equal(masks, draw("reference", 1, 2, SAMPLES, GRID, 0.9))


# ---- dispatch and errors ----


def test_cpu_uses_cpp_unless_forced():
    assert "tube_mask" in mvd_kernels.operators()
    assert mvd_kernels.implementation("tube_mask", "cpu") == ("cpp", "the tensors are on cpu")
    assert mvd_kernels.implementation("tube_mask", "meta")[0] == "reference"
    with use_impl("reference"):
        assert mvd_kernels.implementation("tube_mask", "cpu") == ("reference", "forced by use_impl")
        with use_impl("triton"):
            assert mvd_kernels.implementation("tube_mask", "cuda")[0] == "triton"
        assert mvd_kernels.implementation("tube_mask", "cpu")[0] == "reference"


def test_unknown_names_are_refused():
    with (
        pytest.raises(ValueError, match="no implementation 'fast'; choose one of reference, cpp, triton"),
        use_impl("fast"),
    ):
        pass
    with pytest.raises(ValueError, match=r"no operator 'tub_mask'; choose one of .*tube_mask"):
        mvd_kernels.implementation("tub_mask", "cpu")
    with pytest.raises(ValueError, match="cannot run as 'cpp' on cuda"), use_impl("cpp"):
        mvd_kernels.implementation("tube_mask", "cuda")


def test_without_the_extension_the_reference_runs_with_one_warning():
    """In a process of its own, as importing the extension cannot be undone."""
    script = (
        "import sys, warnings; sys.modules['mvd_kernels._C'] = None\n"
        "import torch, mvd_kernels\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    for _ in range(3): mvd_kernels.tube_mask(0, 0, torch.arange(2), (8, 14, 14), 0.9)\n"
        "print(*(warning.message for warning in caught), sep='\\n')"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.count("\n") == 1
    assert "the C++ extension is not built" in result.stdout
    assert "pip install -e . --no-build-isolation" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"seed": -1}, r"seed is -1; it must be at least 0 and below 2\*\*63"),
        ({"epoch": 2**32}, r"epoch is 4294967296; it must be at least 0 and below 2\*\*32"),
        ({"samples": torch.zeros(2)}, r"samples is torch.float32 \[2\] on cpu; it must be torch.int64 \[B\]"),
        ({"samples": SAMPLES[None]}, r"samples is torch.int64 \[1, 8\]"),
        ({"grid": (8, 14)}, r"grid is \(8, 14\); it must be three positive integers"),
        ({"grid": (8, 0, 14)}, r"grid is \(8, 0, 14\)"),
        ({"ratio": 1.5}, r"ratio is 1.5; it must be between 0 \(nothing masked\) and 1"),
        ({"ratio": float("nan")}, "ratio is nan"),
    ],
)
def test_error_sentences(arguments, sentence):
    accepted = {"seed": 0, "epoch": 0, "samples": SAMPLES, "grid": GRID, "ratio": 0.9}
    with pytest.raises(ValueError, match=sentence):
        tube_mask(**accepted | arguments)


# ---- the DALI operator ----


def dali_masks(numbers: np.ndarray, grid: tuple[int, int, int], ratio: float, on_gpu: bool = False) -> torch.Tensor:
    """One run of a DALI pipeline: int64 [B, 3] -> bool [B, N]."""
    from nvidia.dali import fn, pipeline_def

    from mvd_fast.data import dali_plugin

    @pipeline_def(batch_size=len(numbers), num_threads=2, device_id=0 if on_gpu else None)
    def pipeline():
        node = fn.external_source(source=lambda: list(numbers))
        return dali_plugin.tube_mask(node.gpu() if on_gpu else node, grid, ratio)

    (masks,) = pipeline().run()
    return torch.from_numpy(np.stack([np.asarray(mask) for mask in (masks.as_cpu() if on_gpu else masks)]))


@pytest.mark.parametrize("on_gpu", [False, pytest.param(True, marks=pytest.mark.gpu)])
@pytest.mark.parametrize(("grid", "ratio"), [(GRID, 0.9), ((4, 7, 5), 0.75), ((2, 2, 5), 0.7), ((2, 3, 3), 1.0)])
def test_dali_operator_equals_the_torch_operator(grid, ratio, on_gpu):
    if on_gpu and not torch.cuda.is_available():
        pytest.skip("no GPU")
    numbers = np.stack([np.full(8, 2**62 + 1), np.full(8, 2**32 - 1), SAMPLES.numpy()], axis=1)
    want = tube_mask(2**62 + 1, 2**32 - 1, SAMPLES, grid, ratio).mask
    assert torch.equal(dali_masks(numbers, grid, ratio, on_gpu), want)


def test_dali_operator_refuses_other_input():
    with pytest.raises(RuntimeError, match="three numbers: seed, epoch, sample"):
        dali_masks(np.zeros((2, 4), np.int64), GRID, 0.9)
    with pytest.raises(RuntimeError, match="must be int64"):
        dali_masks(np.zeros((2, 3), np.int32), GRID, 0.9)


def test_missing_plugin_names_the_build_command(monkeypatch):
    pytest.importorskip("nvidia.dali")
    from mvd_fast.data import dali_plugin

    monkeypatch.setattr(dali_plugin, "plugin_path", lambda: None)
    with pytest.raises(ValueError, match="the DALI plugin is not built; `pip install -e"):
        dali_plugin.load_plugin.__wrapped__()
