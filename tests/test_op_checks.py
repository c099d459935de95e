"""The grid of the operators' tests: every pair of values meets, in few cases."""

from __future__ import annotations

import itertools

import pytest
from op_checks import all_pairs

FACTORS = (("portable", "avx2", "avx512", "triton"), ("fp32", "bf16"), tuple(range(9)), (False, True))


@pytest.mark.parametrize("factors", [FACTORS, FACTORS[:2], FACTORS[2:], FACTORS[:1] * 5, FACTORS[1:2] * 6], ids=len)
def test_every_pair_of_values_meets(factors):
    rows = all_pairs(*factors)
    assert len(set(rows)) == len(rows) and rows == all_pairs(*factors)
    for first, second in itertools.combinations(range(len(factors)), 2):
        assert {(row[first], row[second]) for row in rows} == set(itertools.product(factors[first], factors[second]))


def test_there_are_few_cases():
    assert len(all_pairs(*FACTORS)) <= 40  # of 144; 36 is the least that can be
    assert len(all_pairs(*FACTORS[1:2] * 6)) <= 10  # of 64
