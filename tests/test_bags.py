import math

import pytest
import torch

from hf_tst.bags.folding import average_embeddings, fold_into_bags, next_bag_labels, next_window_labels
from hf_tst.bags.weighting import (
    INPUT_WEIGHTINGS,
    OFFSET_WEIGHTINGS,
    input_weights,
    offset_weights,
    resolve_weighting,
)


def test_fold_keeps_contiguous_tokens_together():
    tokens = torch.arange(12).view(1, 12)
    assert fold_into_bags(tokens, 3).tolist() == [[[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]]


def test_a_row_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="multiple of the bag size"):
        fold_into_bags(torch.zeros(1, 10, dtype=torch.long), 3)


def test_next_bag_labels_leave_the_last_position_without_a_target():
    bags = fold_into_bags(torch.arange(6).view(1, 6), 2)
    assert next_bag_labels(bags).tolist() == [[[2, 3], [4, 5], [-100, -100]]]


def test_next_window_labels_hold_the_next_tokens():
    labels = next_window_labels(torch.arange(4).view(1, 4), 2)
    assert labels.tolist() == [[[1, 2], [2, 3], [3, -100], [-100, -100]]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_average_is_the_float32_mean_in_the_dtype_of_the_embedding(dtype):
    embedding = torch.nn.Embedding(50, 8, dtype=dtype)
    bags = torch.randint(0, 50, (2, 5, 16))
    mean = torch.stack([embedding.weight.float()[bags[..., i]] for i in range(16)]).sum(0) / 16
    average = average_embeddings(embedding(bags.flatten(1)), bags)
    assert average.dtype == dtype
    torch.testing.assert_close(average, mean.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weighting", INPUT_WEIGHTINGS)
@pytest.mark.parametrize("has_short_bags", [False, True])
def test_a_weighted_average_is_that_of_a_loop_over_the_tokens_that_a_bag_holds(
    dtype, weighting, has_short_bags
):
    generator = torch.Generator().manual_seed(0)
    embedding = torch.nn.Embedding(50, 8, dtype=dtype)
    bags = torch.randint(0, 50, (2, 5, 6), generator=generator)
    if has_short_bags:
        bags[torch.rand(bags.shape, generator=generator) < 0.4] = -100
        bags[0, 0] = -100  # holds nothing
    embedded = embedding(bags.clamp_min(0).flatten(1))
    found = average_embeddings(embedded, bags, input_weights(weighting, 6), has_short_bags)
    found.float().square().sum().backward()
    grad, embedding.weight.grad = embedding.weight.grad, None
    law = {"uniform": lambda i: 1, "linear": lambda i: i + 1, "exponential": math.exp}[weighting]
    rows = []
    for bag in bags.flatten(0, 1).tolist():
        held = [(law(i), token) for i, token in enumerate(bag) if token != -100]
        whole = sum(weight for weight, _ in held)
        vectors = [embedding.weight[token].float() * (weight / whole) for weight, token in held]
        rows.append(sum(vectors, torch.zeros(8)))
    expected = torch.stack(rows).view(2, 5, 8)
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected.to(dtype))
    expected.to(dtype).float().square().sum().backward()
    if dtype == torch.float32:  # bfloat16 rounds each addition to a row
        torch.testing.assert_close(grad, embedding.weight.grad)


def test_weights_follow_their_laws():
    assert input_weights("uniform", 4).tolist() == [0.25] * 4
    torch.testing.assert_close(input_weights("linear", 4), torch.tensor([0.1, 0.2, 0.3, 0.4]))
    ratio = input_weights("exponential", 200)
    assert ratio[-1] / ratio[-2] == pytest.approx(math.e)
    assert offset_weights("uniform", 4).tolist() == [0.25] * 4
    torch.testing.assert_close(offset_weights("power_law", 2), torch.tensor([2 / 3, 1 / 3]))
    ratio = offset_weights("exponential", 3)
    assert ratio[1] / ratio[0] == pytest.approx(math.exp(-1))
    assert offset_weights("first_token", 3).tolist() == [1, 0, 0]
    fitted = offset_weights("fitted_power_law", 2)
    assert fitted[0] / fitted[1] == pytest.approx((3.63 + 1.35) / (3.63 + 1.35 * 2**-1.25))


@pytest.mark.parametrize("weighting", sorted({*OFFSET_WEIGHTINGS, *INPUT_WEIGHTINGS}))
@pytest.mark.parametrize("bag_size", [1, 6, 16])
def test_weights_sum_to_one(weighting, bag_size):
    for weights, known in ((offset_weights, OFFSET_WEIGHTINGS), (input_weights, INPUT_WEIGHTINGS)):
        if weighting in known:
            assert weights(weighting, bag_size).sum().item() == pytest.approx(1)


def test_unknown_weightings_and_idle_ones_are_refused():
    with pytest.raises(ValueError, match="weighting must be one of"):
        offset_weights("linear", 4)
    with pytest.raises(ValueError, match="single target"):
        resolve_weighting("input", "power_law")
    with pytest.raises(ValueError, match="weighting must be one of"):
        input_weights("power_law", 4)
    with pytest.raises(ValueError, match="reads single tokens"):
        resolve_weighting("output", "uniform", "linear")
    assert resolve_weighting("input", "uniform") == "first_token"
