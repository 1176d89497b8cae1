"""The fused loss against the naive loop of s cross entropies over all logits."""

import pytest
import torch
import torch.nn.functional as F
from benchmarking import peak_memory
from hypothesis import given, settings
from hypothesis import strategies as st
from test_loss import naive_loss

from hf_tst import linear_multi_hot_cross_entropy, multi_hot_cross_entropy, offset_weights
from hf_tst.bags.weighting import OFFSET_WEIGHTINGS
from hf_tst.losses import linear
from hf_tst.losses.linear import CHUNK_BYTES, chunk_rows


@pytest.fixture(autouse=True, scope="module")
def small_chunks():
    """Tiny cases take several chunks, too: of nine rows with the usual vocabulary of 53."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(CHUNK_BYTES, "cpu", 2000)
        yield


def make_case(rows=37, size=12, vocabulary=53, bag_size=4, dtype=torch.float32, seed=1):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(dtype).requires_grad_()

    labels = torch.randint(0, vocabulary, (rows, bag_size), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < 0.2] = -100
    labels[0] = 0  # one token, as often as there are places in the bag
    labels[-1] = -100
    return normal(rows, size), normal(vocabulary, size), normal(vocabulary), labels


def naive(hidden, weight, bias, labels, weights, softcap=None, logit_scale=None):
    logits = F.linear(hidden, weight, bias)
    if logit_scale is not None:
        logits = logits * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return naive_loss(logits, labels, weights)


def gradients(loss, *inputs):
    return torch.autograd.grad(loss, [x for x in inputs if x is not None])


@pytest.mark.parametrize("weighting", OFFSET_WEIGHTINGS)
@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"rows": 1, "bag_size": 1},
        {"rows": 2, "size": 1, "vocabulary": 2},
        {"rows": 64, "bag_size": 16},
        {"vocabulary": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize("has_bias", [True, False])
def test_loss_and_gradients_equal_the_loop(weighting, shape, has_bias):
    hidden, weight, bias, labels = make_case(**shape)
    labels[0] = 0
    bias = bias if has_bias else None
    weights = offset_weights(weighting, labels.shape[1])
    expected = naive(hidden, weight, bias, labels, weights)
    loss = linear_multi_hot_cross_entropy(hidden, weight, labels, bias=bias, weights=weights)
    torch.testing.assert_close(loss, expected)
    for ours, theirs in zip(
        gradients(3 * loss, hidden, weight, bias), gradients(3 * expected, hidden, weight, bias), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@given(
    rows=st.integers(1, 70),
    vocabulary=st.integers(1, 60),
    bag_size=st.integers(1, 9),
    softcap=st.sampled_from([None, 0.5, 30.0]),
    logit_scale=st.sampled_from([None, 0.0625, 2.0]),
)
@settings(deadline=None, max_examples=60)
def test_any_shape_scale_and_cap(rows, vocabulary, bag_size, softcap, logit_scale):
    hidden, weight, bias, labels = make_case(rows, 5, vocabulary, bag_size)
    labels[0] = 0
    options = {"softcap": softcap, "logit_scale": logit_scale}
    weights = offset_weights("power_law", bag_size)
    expected = naive(hidden, weight, bias, labels, weights, **options)
    loss = linear_multi_hot_cross_entropy(hidden, weight, labels, bias=bias, weights=weights, **options)
    torch.testing.assert_close(loss, expected)
    for ours, theirs in zip(
        gradients(loss, hidden, weight, bias), gradients(expected, hidden, weight, bias), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bag_size", [1, 8])
def test_errors_are_no_larger_than_the_loops(dtype, bag_size, monkeypatch):
    """Against float64: the loop in the same dtype has the larger root-mean-square error, or the same."""
    monkeypatch.setitem(CHUNK_BYTES, "cpu", 2**16)  # 16 rows in float32
    hidden, weight, bias, labels = make_case(256, 32, 1000, bag_size, dtype=dtype)
    weights = offset_weights("uniform", bag_size)
    exact_inputs = [x.detach().double().requires_grad_() for x in (hidden, weight, bias)]
    exact = naive(*exact_inputs, labels, weights.double())
    exact_gradients = gradients(exact, *exact_inputs)

    def errors(loss):
        found = [loss, *gradients(loss, hidden, weight, bias)]
        return [
            (a.double() - b).square().mean().sqrt().item()
            for a, b in zip(found, [exact, *exact_gradients], strict=True)
        ]

    ours = errors(linear_multi_hot_cross_entropy(hidden, weight, labels, bias=bias, weights=weights))
    loop = errors(naive(hidden, weight, bias, labels, weights))
    # 5 %: two float32 sums of the same numbers in another order differ that much in their error.
    tolerance = 1.05 * torch.tensor(loop) + torch.tensor([1e-6, 0, 0, 0])
    assert (torch.tensor(ours) <= tolerance).all(), (ours, loop)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_computes_in_its_dtype_and_returns_gradients_in_the_inputs(dtype):
    hidden, weight, bias, labels = make_case(64, 32, 200)
    expected = naive(hidden, weight, bias, labels, offset_weights("uniform", 4))
    with torch.autocast("cpu", dtype=dtype):
        loss = linear_multi_hot_cross_entropy(hidden, weight, labels, bias=bias)
    found = gradients(loss * 2.0**14, hidden, weight, bias)  # as a gradient scaler does
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=5e-3, atol=5e-3)
    for ours, theirs in zip(found, gradients(expected * 2.0**14, hidden, weight, bias), strict=True):
        assert ours.dtype == torch.float32
        assert (ours - theirs).norm() <= 0.02 * theirs.norm()


def test_small_gradients_survive_float16():
    """A gradient divided by a large batch is below float16's smallest number; multiplied by the loss scale it is not."""
    hidden, weight, _, labels = make_case(64, 32, 200, dtype=torch.float16)
    items = 2.0**20
    loss = linear_multi_hot_cross_entropy(hidden, weight, labels, num_items_in_batch=items)
    (found,) = gradients(loss * items, hidden)
    reference = linear_multi_hot_cross_entropy(hidden.float(), weight.float(), labels, num_items_in_batch=1.0)
    torch.testing.assert_close(found.float(), gradients(reference, hidden)[0].float(), rtol=0.05, atol=0.01)


@pytest.mark.parametrize("frozen", [(), ("hidden",), ("weight",), ("bias",), ("hidden", "weight", "bias")])
def test_frozen_tensors_get_no_gradient(frozen):
    names = ("hidden", "weight", "bias")
    hidden, weight, bias, labels = make_case()
    tensors = dict(zip(names, (hidden, weight, bias), strict=True))
    expected = gradients(naive(hidden, weight, bias, labels, offset_weights("uniform", 4)), *tensors.values())
    for name in frozen:
        tensors[name] = tensors[name].detach()
    loss = linear_multi_hot_cross_entropy(tensors["hidden"], tensors["weight"], labels, bias=tensors["bias"])
    assert loss.requires_grad == (len(frozen) < 3)
    if loss.requires_grad:
        loss.backward()
    for name, gradient in zip(names, expected, strict=True):
        if name in frozen:
            assert tensors[name].grad is None
        else:
            torch.testing.assert_close(tensors[name].grad, gradient, rtol=1e-4, atol=1e-6)


def test_leading_dimensions_and_micro_batches():
    hidden, weight, bias, labels = make_case(rows=36)
    whole = linear_multi_hot_cross_entropy(hidden, weight, labels, bias=bias)
    shaped = linear_multi_hot_cross_entropy(
        hidden.view(4, 9, -1), weight, labels.view(4, 9, -1), bias=bias, num_items_in_batch=None
    )
    torch.testing.assert_close(shaped, whole)
    items = ((labels != -100).sum() / 4).item()
    parts = [
        linear_multi_hot_cross_entropy(
            hidden[part], weight, labels[part], bias=bias, num_items_in_batch=torch.tensor(items)
        )
        for part in (slice(0, 5), slice(5, 36))
    ]
    torch.testing.assert_close(sum(parts), whole)


def test_the_loss_goes_through_checkpointing_as_it_is():
    hidden, weight, bias, labels = make_case()
    loss = linear_multi_hot_cross_entropy(hidden, weight, labels, bias=bias)
    expected = gradients(loss, hidden, weight, bias)
    for reentrant in (True, False):
        loss = torch.utils.checkpoint.checkpoint(
            lambda *inputs: linear_multi_hot_cross_entropy(inputs[0], inputs[1], labels, bias=inputs[2]),
            hidden, weight, bias, use_reentrant=reentrant,
        )  # fmt: skip
        for tensor in (hidden, weight, bias):
            tensor.grad = None
        loss.backward()
        for tensor, gradient in zip((hidden, weight, bias), expected, strict=True):
            torch.testing.assert_close(tensor.grad, gradient)


def test_torch_compile_needs_no_graph_break():
    hidden, weight, bias, labels = make_case()

    def loss_of(hidden, weight, bias):
        return linear_multi_hot_cross_entropy(hidden * 2, weight, labels, bias=bias)

    compiled = torch.compile(loss_of, backend="aot_eager", fullgraph=True)
    expected, loss = loss_of(hidden, weight, bias), compiled(hidden, weight, bias)
    assert torch.equal(loss, expected)
    for ours, theirs in zip(
        gradients(loss, hidden, weight, bias), gradients(expected, hidden, weight, bias), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_the_operator_keeps_its_contract():
    """Schema, shapes under fake tensors and autograd registration, as PyTorch itself checks them."""
    hidden, weight, bias, labels = make_case()
    arguments = (
        hidden, weight, bias, labels, offset_weights("uniform", 4), torch.tensor(3.0),
        -100, None, 1.0, torch.float32, [True, True, True],
    )  # fmt: skip
    torch.library.opcheck(
        torch.ops.hf_tst.linear_multi_hot_cross_entropy.default,
        arguments,
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


def test_all_ignored_gives_zero_loss_and_gradient():
    hidden, weight, bias, labels = make_case()
    loss = linear_multi_hot_cross_entropy(hidden, weight, torch.full_like(labels, -100), bias=bias)
    assert loss.item() == 0
    for gradient in gradients(loss, hidden, weight, bias):
        assert torch.equal(gradient, torch.zeros_like(gradient))


def test_a_second_backward_is_refused():
    hidden, weight, bias, labels = make_case()
    loss = linear_multi_hot_cross_entropy(hidden, weight, labels, bias=bias)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="instead of using retain_graph"):
        loss.backward()


@pytest.mark.parametrize("bag_size", [1, 16])
def test_never_more_than_a_chunk_of_logits_is_held(bag_size, monkeypatch):
    """Peak memory in the forward and the backward pass does not grow with s, nor with the rows."""
    budget, vocabulary = 2**18, 2000
    monkeypatch.setitem(CHUNK_BYTES, "cpu", budget)
    for rows in (128, 512):
        hidden, weight, bias, labels = make_case(rows, 8, vocabulary, bag_size)

        def step(hidden=hidden, weight=weight, bias=bias, labels=labels):
            linear_multi_hot_cross_entropy(hidden, weight, labels, bias=bias).backward()

        peak = peak_memory(step, torch.device("cpu"))
        gradients_size = 4 * (hidden.numel() + weight.numel() + bias.numel())
        small = 3 * labels.nbytes + 8 * rows  # checks of the labels, losses
        assert 0.9 * budget < peak - gradients_size < 1.1 * budget + small


def test_chunks_fit_their_budget_and_leave_the_products_efficient():
    for vocabulary, size in ((32_000, 576), (128_256, 576), (128_256, 2048), (262_144, 4096)):
        for rows in (8192, 65536):
            chunk = chunk_rows(rows, vocabulary, size, 2, "cuda")
            assert 1024 <= chunk <= max(1024, 2 * size)
            assert chunk * vocabulary * 2 <= CHUNK_BYTES["cuda"]
    assert chunk_rows(7, 128_256, 576, 2, "cuda") == 7
    assert chunk_rows(7, 10**9, 576, 4, "cpu") == 1


@pytest.mark.parametrize("has_bias", [True, False])
def test_rows_of_logits_are_aligned_for_any_vocabulary(has_bias, monkeypatch):
    """Else a GPU reads them an element at a time, and has no fast product for them."""
    strides, select = [], linear.select_kernel

    def noted(logits, *args, **options):
        strides.append(logits.stride())
        return select(logits.device)(logits, *args, **options)

    monkeypatch.setattr(linear, "select_kernel", lambda device: noted)
    hidden, weight, bias = torch.randn(7, 8), torch.randn(97, 8), torch.randn(97) if has_bias else None
    labels = torch.randint(0, 97, (7, 2))
    loss = linear_multi_hot_cross_entropy(hidden, weight, labels, bias=bias)
    torch.testing.assert_close(loss, multi_hot_cross_entropy(F.linear(hidden, weight, bias), labels))
    assert {*strides} == {(112, 1)}


def test_products_of_low_precision_are_added_in_float32():
    """Chunks of one row: 4096 products of 1 each, of which bfloat16 could count 256."""
    rows = 4096
    hidden = torch.ones(rows, 1, dtype=torch.bfloat16)
    weight = torch.tensor([[100.0], [0.0]], dtype=torch.bfloat16).requires_grad_()
    labels = torch.ones(rows, 1, dtype=torch.long)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(CHUNK_BYTES, "cpu", 4)
        loss = linear_multi_hot_cross_entropy(hidden, weight, labels, num_items_in_batch=1)
    (found,) = gradients(loss, weight)
    assert found.tolist() == [[rows], [-rows]]


def test_no_rows_give_gradients_of_zero():
    hidden, weight, bias, labels = make_case(rows=2)
    loss = linear_multi_hot_cross_entropy(hidden[:0], weight, labels[:0], bias=bias)
    assert loss.item() == 0
    assert not any(gradient.any() for gradient in gradients(loss, weight, bias))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": torch.full((37, 4), 53)}, "labels must be from 0 to 52, .* but one is 53"),
        ({"labels": torch.full((37, 4), -1)}, "but one is -1"),
        ({"labels": torch.zeros(36, 4, dtype=torch.long)}, r"labels has shape .* must have \(37, 4\)"),
        ({"weight": torch.zeros(53, 13)}, r"weight has shape .* must have \(53, 12\)"),
        ({"bias": torch.zeros(52)}, r"bias has shape .* must have \(53,\)"),
        ({"weights": torch.zeros(4)}, "at least 0, and one of them above 0"),
        ({"weights": torch.tensor([1.0, -1, 1, 1])}, "at least 0"),
        ({"weights": torch.tensor([1.0, float("nan"), 1, 1])}, "at least 0"),
        ({"weights": torch.ones(3)}, r"weights has shape .* must have \(4,\)"),
        ({"softcap": 0.0}, "softcap must be more than 0"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    hidden, weight, bias, labels = make_case()
    arguments = {"hidden": hidden, "weight": weight, "bias": bias, "labels": labels} | change
    with pytest.raises(ValueError, match=message):
        linear_multi_hot_cross_entropy(**arguments)
    if set(change) <= {"labels", "weights"} and "hidden" not in message:
        with pytest.raises(ValueError, match=message):
            multi_hot_cross_entropy(
                F.linear(hidden, weight), arguments["labels"], weights=change.get("weights")
            )


@pytest.mark.parametrize("items", [0, torch.tensor(0.0)])
def test_no_items_beside_targets_make_no_finite_loss_fused_or_not(items):
    """A count of 0 for a batch with targets is a mistake, which must show."""
    hidden, weight, labels = torch.randn(3, 4), torch.randn(7, 4), torch.tensor([[1, 2], [3, -100], [0, 0]])
    for loss in (
        linear_multi_hot_cross_entropy(hidden, weight, labels, num_items_in_batch=items),
        multi_hot_cross_entropy(hidden @ weight.T, labels, num_items_in_batch=items),
    ):
        assert loss.item() == float("inf")


def test_another_ignore_index_is_left_out_of_the_number_of_targets():
    hidden, weight, _, labels = make_case()
    expected = linear_multi_hot_cross_entropy(hidden, weight, labels)
    found = linear_multi_hot_cross_entropy(
        hidden, weight, labels.masked_fill(labels == -100, -7), ignore_index=-7
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("lower", ["hidden", "weight"])
def test_products_take_the_higher_precision_of_states_and_weight(lower):
    hidden, weight, _, labels = make_case()
    given = {"hidden": hidden.detach(), "weight": weight.detach()}
    given[lower] = given[lower].bfloat16()
    exact = naive(
        given["hidden"].double(),
        given["weight"].double(),
        None,
        labels,
        offset_weights("uniform", 4).double(),
    )
    found = linear_multi_hot_cross_entropy(given["hidden"], given["weight"], labels)
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)
