import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from arma_mergekit.errors import CheckpointError
from arma_mergekit.kernel import CHUNK, average, average_numpy, round_alpha, sole_operand

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def as_numpy(tensor):
    return (
        tensor.contiguous().view(torch.uint16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()
    )


def same_bits(left, right):
    return left.dtype == right.dtype and as_numpy(left).tobytes() == as_numpy(right).tobytes()


def draw(seed, shape, dtype, spread=1.0):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * spread).to(dtype)


@given(
    seed=st.integers(0, 2**32 - 1),
    dtype=st.sampled_from(DTYPES),
    alphas=st.lists(st.floats(-2, 3, width=32), min_size=1, max_size=3),
    size=st.integers(0, 300),
    spread=st.sampled_from([1e-30, 1e-3, 1.0, 100.0]),
)
@settings(max_examples=200, deadline=None)
def test_torch_and_numpy_give_the_same_bits(seed, dtype, alphas, size, spread):
    base = draw(seed, size, dtype, spread)
    tuned = [draw(seed + i + 1, size, dtype, spread) for i in range(len(alphas))]
    ours = as_numpy(average(base, tuned, alphas))
    assert ours.tobytes() == average_numpy(as_numpy(base), [as_numpy(t) for t in tuned], alphas).tobytes()


def test_torch_and_numpy_agree_across_chunks_and_shapes():
    base, tuned = (draw(i, (3, CHUNK // 2 + 7), torch.bfloat16) for i in (0, 1))
    ours = average(base, [tuned], [0.3])
    assert ours.shape == base.shape
    assert as_numpy(ours).tobytes() == average_numpy(as_numpy(base), [as_numpy(tuned)], [0.3]).tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("alpha", [0.6, -0.4, 1.5, 2.5])
def test_result_is_the_rounded_float64_reference_almost_everywhere_and_never_further_than_one_ulp(
    dtype, alpha
):
    base = draw(1, 200_000, dtype)
    tuned = (base.float() + draw(2, 200_000, torch.float32, 0.05)).to(dtype)
    result = average(base, [tuned], [alpha])
    exact = (base.double() + alpha * (tuned.double() - base.double())).to(dtype)
    bits = torch.int16 if dtype.itemsize == 2 else torch.int32
    apart = (result.view(bits).long() - exact.view(bits).long()).abs()
    near_zero = (
        exact.abs() < 1e-3
    )  # cancellation: a unit in the last place of the operands, not of the tiny result
    assert apart[~near_zero].max() <= 1
    assert (apart == 0).double().mean() >= 0.995


def test_alpha_zero_is_the_base_itself_and_alpha_one_the_finetuned_itself():
    base, first, second = (draw(i, 5, torch.bfloat16) for i in range(3))
    assert average(base, [first, second], [0, 0]) is base
    assert average(base, [first, second], [1, 0]) is first
    assert average(base, [first, second], [0, 1]) is second
    assert same_bits(average(base, [first], [1.0], out=torch.empty_like(base)), first)


def test_sole_operand_is_none_when_two_models_contribute():
    assert sole_operand([1, 1]) is None
    assert sole_operand([0.5]) is None


def test_noise_of_interpolated_lists_does_not_reach_the_arithmetic():
    assert round_alpha(1 - 1e-15) == 1
    assert round_alpha(1e-16) == 0
    assert round_alpha(0.30000000000000004) == round_alpha(0.3)


def test_two_finetuned_models_add_their_deltas():
    base = torch.zeros(3)
    result = average(base, [torch.ones(3), torch.full((3,), 2.0)], [0.5, 0.25])
    assert result.tolist() == [1.0, 1.0, 1.0]


def test_inputs_are_never_written_to():
    base, tuned = draw(0, 10, torch.bfloat16), draw(1, 10, torch.bfloat16)
    before = base.clone(), tuned.clone()
    average(base, [tuned], [0.5])
    assert same_bits(base, before[0])
    assert same_bits(tuned, before[1])


def test_mixed_dtypes_keep_the_dtype_of_the_base():
    assert average(draw(0, 4, torch.bfloat16), [draw(1, 4, torch.float16)], [0.5]).dtype == torch.bfloat16


def test_transposed_input_is_averaged_by_position_not_by_memory():
    base, tuned = draw(0, (4, 6), torch.float32).T, draw(1, (4, 6), torch.float32).T
    assert same_bits(average(base, [tuned], [0.5]), average(base.contiguous(), [tuned.contiguous()], [0.5]))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused(bad):
    base = torch.tensor([1.0, bad], dtype=torch.bfloat16)
    tuned = torch.ones(2, dtype=torch.bfloat16)
    with pytest.raises(CheckpointError, match="not finite"):
        average(base, [tuned], [0.5])
    with np.errstate(invalid="ignore"), pytest.raises(CheckpointError, match="not finite"):
        average_numpy(as_numpy(base), [as_numpy(tuned)], [0.5])


def test_extrapolation_that_overflows_the_dtype_is_refused():
    with pytest.raises(CheckpointError, match="not finite"):
        average(torch.zeros(1, dtype=torch.float16), [torch.full((1,), 60000.0, dtype=torch.float16)], [1.5])


@pytest.mark.parametrize("alpha", [float("nan"), float("inf")])
def test_alpha_that_is_not_finite_is_refused(alpha):
    with pytest.raises(ValueError, match="finite"):
        average(torch.zeros(1), [torch.ones(1)], [alpha])


def test_shapes_that_differ_are_refused_with_both_shapes():
    with pytest.raises(ValueError, match=r"\(2,\).*\(3,\)"):
        average(torch.zeros(2), [torch.zeros(3)], [0.5])


def test_integer_tensors_are_refused_unless_copied():
    ints = torch.arange(3)
    assert average(ints, [ints + 1], [0]) is ints
    with pytest.raises(ValueError, match="floating-point"):
        average(ints, [ints + 1], [0.5])
