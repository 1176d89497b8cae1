import math

import pytest
import torch
import torch.nn.functional as F
from benchmarking import peak_memory

from hf_tst import multi_hot_cross_entropy, offset_weights
from hf_tst.bags.weighting import OFFSET_WEIGHTINGS
from hf_tst.losses.multi_hot import count_target_bags, sum_bag_entropies


def naive_loss(logits, labels, weights):
    """The paper's loop: s ordinary cross entropies, in the dtype of the logits."""
    vocabulary = logits.shape[-1]
    total, count = 0.0, 0.0
    for i, weight in enumerate(weights):
        targets = labels[..., i].reshape(-1)
        losses = F.cross_entropy(logits.reshape(-1, vocabulary), targets, ignore_index=-100, reduction="none")
        total = total + weight * losses.sum()
        count = count + weight * (targets != -100).sum()
    return total / count


def make_case(shape, bag_size, vocabulary=31, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    logits = (3 * torch.randn(*shape, vocabulary, generator=generator)).to(dtype).requires_grad_()
    labels = torch.randint(0, vocabulary, (*shape, bag_size), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < 0.2] = -100
    labels[0] = torch.randint(0, vocabulary, labels[0].shape, generator=generator)
    return logits, labels


@pytest.mark.parametrize("weighting", OFFSET_WEIGHTINGS)
@pytest.mark.parametrize(("shape", "bag_size"), [((2, 5), 4), ((7,), 1), ((1, 1), 3), ((3, 2, 2), 16)])
def test_loss_and_gradient_equal_the_loop_of_cross_entropies(weighting, shape, bag_size):
    logits, labels = make_case(shape, bag_size)
    weights = offset_weights(weighting, bag_size)
    expected = naive_loss(logits, labels, weights)
    (expected_gradient,) = torch.autograd.grad(expected, logits)
    loss = multi_hot_cross_entropy(logits, labels, weights=weights)
    (gradient,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient, expected_gradient)


def test_bfloat16_is_at_least_as_exact_as_the_loop_in_bfloat16():
    logits, labels = make_case((4, 9), 6, vocabulary=500, dtype=torch.bfloat16)
    weights = offset_weights("uniform", 6)
    exact = naive_loss(logits.double(), labels, weights.double())
    (exact_gradient,) = torch.autograd.grad(exact, logits)
    exact_logits = logits.detach().double().requires_grad_()
    (exact_gradient,) = torch.autograd.grad(naive_loss(exact_logits, labels, weights.double()), exact_logits)

    def error(loss_function):
        loss = loss_function()
        (gradient,) = torch.autograd.grad(loss, logits)
        return abs(loss.double() - exact), (gradient.double() - exact_gradient).abs().max()

    ours = error(lambda: multi_hot_cross_entropy(logits, labels, weights=weights))
    naive = error(lambda: naive_loss(logits, labels, weights))
    assert ours[0] <= naive[0]
    assert ours[1] <= naive[1]


def test_default_weights_are_uniform():
    logits, labels = make_case((2, 3), 4)
    torch.testing.assert_close(
        multi_hot_cross_entropy(logits, labels),
        multi_hot_cross_entropy(logits, labels, weights=offset_weights("uniform", 4)),
    )


@pytest.mark.parametrize("as_tensor", [True, False])
def test_micro_batches_add_up_to_the_whole_batch(as_tensor):
    logits, labels = make_case((4, 5), 3)
    weights = offset_weights("power_law", 3)
    whole = multi_hot_cross_entropy(logits, labels, weights=weights)
    items = count_target_bags(labels, weights=weights)
    parts = [
        multi_hot_cross_entropy(
            logits[rows],
            labels[rows],
            weights=weights,
            num_items_in_batch=items if as_tensor else items.item(),
        )
        for rows in (slice(0, 1), slice(1, 4))
    ]
    torch.testing.assert_close(sum(parts), whole)


def test_uniform_logits_cost_log_v():
    labels = torch.randint(0, 1000, (2, 3, 4))
    loss = multi_hot_cross_entropy(torch.zeros(2, 3, 1000), labels)
    torch.testing.assert_close(loss, torch.tensor(1000.0).log())


def test_nothing_to_predict_gives_zero_loss_and_gradient():
    logits = torch.randn(2, 3, 7, requires_grad=True)
    loss = multi_hot_cross_entropy(logits, torch.full((2, 3, 4), -100))
    loss.backward()
    assert loss.item() == 0
    assert logits.grad.abs().max() == 0


def test_a_token_that_is_impossible_costs_nothing_where_it_is_no_target():
    logits = torch.randn(1, 3, 7)
    logits[..., 0] = -torch.inf
    logits.requires_grad_()
    labels = torch.tensor([[[1, 2], [3, 4], [-100, -100]]])
    loss = multi_hot_cross_entropy(logits, labels)
    expected = torch.nn.functional.cross_entropy(
        logits.repeat_interleave(2, 1).flatten(0, 1), labels.flatten()
    )
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, logits), torch.autograd.grad(expected, logits))


def test_another_ignore_index_is_honoured():
    logits, labels = make_case((2, 3), 4)
    torch.testing.assert_close(
        multi_hot_cross_entropy(logits, labels.masked_fill(labels == -100, -1), ignore_index=-1),
        multi_hot_cross_entropy(logits, labels),
    )


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="labels has shape"):
        multi_hot_cross_entropy(torch.zeros(2, 3, 7), torch.zeros(2, 4, 2, dtype=torch.long))
    with pytest.raises(ValueError, match="weights has shape"):
        multi_hot_cross_entropy(torch.zeros(2, 7), torch.zeros(2, 3, dtype=torch.long), weights=torch.ones(2))


@pytest.mark.parametrize("items", [0, torch.tensor(0), torch.tensor(0.0)])
def test_without_targets_the_loss_is_zero_and_so_is_its_gradient(items):
    logits = torch.randn(2, 3, 11, requires_grad=True)
    loss = multi_hot_cross_entropy(logits, torch.full((2, 3, 4), -100), num_items_in_batch=items)
    loss.backward()
    assert loss.item() == 0
    assert not logits.grad.any()


@pytest.mark.parametrize("weighting", OFFSET_WEIGHTINGS)
def test_the_entropy_of_bags_is_the_loss_of_the_best_logits(weighting):
    """Logits of the shares of a bag's tokens have that loss, and others a higher one."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 5, (40, 4), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < 0.2] = -100
    labels[:2] = torch.tensor([[3, 3, 3, 3], [-100] * 4])
    weights = offset_weights(weighting, 4)
    shares = torch.zeros(40, 6)
    shares.scatter_add_(1, labels.masked_fill(labels < 0, 5), weights * (labels >= 0))
    best = shares[:, :5].log().clamp_min(-1e4)
    options = {"weights": weights, "num_items_in_batch": 1}
    entropies = sum_bag_entropies(labels, weights=weights)
    torch.testing.assert_close(multi_hot_cross_entropy(best, labels, **options), entropies)
    other = best.clamp_min(-3) + 0.3 * torch.randn(best.shape, generator=generator)
    assert multi_hot_cross_entropy(other, labels, **options) > entropies
    assert sum_bag_entropies(torch.tensor([[1, 2, 3, 4]])).item() == pytest.approx(math.log(4))


def test_weights_have_the_gradient_of_the_loop():
    logits, labels = make_case((2, 5), 4)
    gradients = []
    for function in (lambda *given: multi_hot_cross_entropy(*given[:2], weights=given[2]), naive_loss):
        weights = offset_weights("power_law", 4).requires_grad_()
        gradients.append(torch.autograd.grad(function(logits, labels, weights), weights)[0])
    torch.testing.assert_close(*gradients)


def test_second_derivatives_are_those_of_the_loop():
    logits, labels = make_case((2, 5), 4)
    weights = offset_weights("power_law", 4)
    found = []
    for loss in (
        multi_hot_cross_entropy(logits, labels, weights=weights),
        naive_loss(logits, labels, weights),
    ):
        (gradient,) = torch.autograd.grad(loss, logits, create_graph=True)
        found.append(torch.autograd.grad(gradient.square().sum(), logits)[0])
    torch.testing.assert_close(*found)


def test_logits_in_float64_have_a_gradient():
    logits, labels = make_case((2, 5), 4, dtype=torch.float64)
    expected = torch.autograd.grad(naive_loss(logits, labels, offset_weights("uniform", 4)), logits)
    found = torch.autograd.grad(multi_hot_cross_entropy(logits, labels), logits)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def test_the_gradient_takes_one_float32_tensor_of_the_size_of_the_logits():
    rows, vocabulary = 64, 4096
    logits, labels = make_case((rows,), 4, vocabulary, torch.bfloat16)
    peak = peak_memory(lambda: multi_hot_cross_entropy(logits, labels).backward(), torch.device("cpu"))
    assert peak < 2.2 * 4 * rows * vocabulary  # that, and the gradient in bfloat16


@pytest.mark.parametrize("weighting", OFFSET_WEIGHTINGS)
def test_counts_and_entropies_leave_out_another_ignore_index(weighting):
    _, labels = make_case((4, 5), 6)
    weights = offset_weights(weighting, 6)
    others = labels.masked_fill(labels == -100, -7)
    for function in (count_target_bags, sum_bag_entropies):
        assert function(others, weights=weights, ignore_index=-7) == function(labels, weights=weights)
