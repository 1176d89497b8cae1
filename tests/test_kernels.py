"""The kernels against s ordinary cross entropies in float64, on the CPU: Triton's runs in its interpreter.

Triton decides when it is first imported whether to interpret, so its cases run in a process of their own.
"""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Softcap and scale of the logits.
TRANSFORMS = [(None, 1.0), (2.5, 1.0), (None, 0.25), (30.0, 2.0)]
DEVICE = os.environ.get("HF_TST_TEST_DEVICE", "cpu")
IN_INTERPRETER = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture
def kernel():
    from hf_tst.kernels import select_kernel

    chosen = select_kernel(torch.device(DEVICE))
    expected = "triton_multi_hot" if IN_INTERPRETER or DEVICE == "cuda" else "torch_multi_hot"
    assert chosen.__module__.endswith(expected)
    return chosen


def make_case(rows, vocabulary, bag_size, dtype, spread=3.0):
    generator = torch.Generator().manual_seed(rows + vocabulary + bag_size)
    logits = (spread * torch.randn(rows, vocabulary, generator=generator)).to(dtype)
    labels = torch.randint(0, vocabulary, (rows, bag_size), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < 0.2] = -100
    labels[0] = vocabulary - 1  # one token, as often as there are places
    labels[-1] = -100
    weights = torch.rand(bag_size, generator=generator)
    weights[bag_size // 2 + 1 :: 5] = 0
    return logits, labels, weights


def naive(logits, labels, weights, softcap, logit_scale):
    """Losses of the rows and the gradient of their sum, in the dtype of `logits`."""
    leaf = logits.clone().requires_grad_()
    z = leaf * logit_scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    losses = sum(
        weight * F.cross_entropy(z, labels[:, i], ignore_index=-100, reduction="none")
        for i, weight in enumerate(weights.to(z.dtype))
    )
    return losses.detach(), torch.autograd.grad(losses.sum(), leaf)[0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("softcap", "logit_scale"), TRANSFORMS)
@pytest.mark.parametrize("bag_size", [1, 2, 3, 16])
@pytest.mark.parametrize("vocabulary", [1, 5, 97, 9001])
def test_loss_and_gradient_are_those_of_the_loop(kernel, vocabulary, bag_size, softcap, logit_scale, dtype):
    logits, labels, weights = make_case(5, vocabulary, bag_size, dtype)
    wide = torch.zeros(5, vocabulary + 3, dtype=dtype)
    wide[:, :vocabulary] = logits
    wide = wide.to(DEVICE)
    rows = wide[:, :vocabulary]  # rows do not follow each other in memory
    losses = kernel(
        rows, labels.to(DEVICE), weights.to(DEVICE), gradient_scale=torch.tensor(0.5, device=DEVICE),
        softcap=softcap, logit_scale=logit_scale,
    )  # fmt: skip
    exact, exact_gradient = naive(logits.double(), labels, weights, softcap, logit_scale)
    single, single_gradient = naive(logits.float(), labels, weights, softcap, logit_scale)
    # The loop in float32 errs by so much; a few bits more are the order of a sum over the vocabulary.
    tolerance = 4 * (single - exact).abs().max() + 1e-5 * (1 + exact.abs().max())
    assert (losses.cpu() - exact).abs().max() <= tolerance
    tolerance = 4 * (single_gradient - exact_gradient).abs().max() + 1e-6 * weights.sum() * logit_scale
    rounding = {torch.float32: 0, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    error = (rows.cpu().double() - 0.5 * exact_gradient).abs()
    assert (error <= tolerance + rounding * exact_gradient.abs() + rounding * 1e-4).all()
    assert wide[:, vocabulary:].abs().max() == 0
    assert losses[-1] == 0
    assert rows[-1].abs().max() == 0


def test_without_gradient_the_logits_stay(kernel):
    for dtype in DTYPES:
        logits, labels, weights = make_case(4, 50, 3, dtype)
        ours = logits.clone().to(DEVICE)
        losses = kernel(
            ours, labels.to(DEVICE), weights.to(DEVICE), gradient_scale=torch.ones((), device=DEVICE), write_gradient=False
        )  # fmt: skip
        assert torch.equal(ours.cpu(), logits)
        exact, _ = naive(logits.double(), labels, weights, None, 1.0)
        torch.testing.assert_close(losses.cpu(), exact.float(), rtol=1e-5, atol=1e-5)


def test_the_largest_logit_may_come_last(kernel):
    """Beyond the first block of a sweep, what was summed up before is worth less."""
    logits = torch.linspace(-20, 20, 20_000).repeat(2, 1)
    labels, weights = torch.tensor([[7, 19_999], [12_345, 0]]), torch.tensor([0.25, 0.75])
    ours = logits.clone().to(DEVICE)
    losses = kernel(ours, labels.to(DEVICE), weights.to(DEVICE), gradient_scale=torch.ones((), device=DEVICE))
    exact, gradient = naive(logits.double(), labels, weights, None, 1.0)
    torch.testing.assert_close(losses.cpu(), exact.float())
    torch.testing.assert_close(ours.cpu(), gradient.float())


def test_huge_and_infinite_logits_and_rows_without_targets(kernel):
    logits = torch.randn(4, 40)
    logits[0] *= 1e4
    logits[1, :20] = -float("inf")  # a vocabulary of which a part is forbidden
    logits[2:] = float("nan")
    labels = torch.tensor([[3, 4], [30, -100], [-100, -100], [5, -100]])
    weights = torch.tensor([1.0, 0.5])
    ours = logits.clone().to(DEVICE)
    losses = kernel(ours, labels.to(DEVICE), weights.to(DEVICE), gradient_scale=torch.ones((), device=DEVICE))
    exact, gradient = naive(logits[:2].double(), labels[:2], weights, None, 1.0)
    torch.testing.assert_close(losses[:2].cpu(), exact.float())
    torch.testing.assert_close(ours[:2].cpu(), gradient.float())
    assert losses[2] == 0
    assert ours[2].abs().max() == 0
    assert losses[3].isnan()


@pytest.mark.skipif(IN_INTERPRETER, reason="the interpreter does not compile")
@pytest.mark.parametrize("has_softcap", [True, False])
@pytest.mark.parametrize("architecture", [80, 90])
def test_triton_kernel_compiles_for_gpus(architecture, has_softcap):
    """Down to machine code, for which no GPU is needed."""
    triton = pytest.importorskip(
        "triton", reason="triton is not installed (it has no wheel for this platform)"
    )
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from hf_tst.kernels.triton_multi_hot import multi_hot_kernel

    signature = dict.fromkeys(multi_hot_kernel.arg_names, "constexpr")
    signature |= {"logits_pointer": "*bf16", "labels_pointer": "*i64"}
    signature |= dict.fromkeys(("weights_pointer", "scale_pointer", "losses_pointer"), "*fp32")
    signature |= dict.fromkeys(("row_stride", "vocabulary", "bag_size", "ignore_index"), "i32")
    signature |= dict.fromkeys(("logit_scale", "softcap"), "fp32")
    constants = {"HAS_SOFTCAP": has_softcap, "WRITE_GRADIENT": True, "BLOCK": 8192, "TARGETS": 16}
    source = ASTSource(multi_hot_kernel, signature, constexprs=constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options={"num_warps": 16})
    assert compiled.asm["cubin"]
    # The stores of the targets' gradients wait for those of the sweep.
    assert "bar.sync" in compiled.asm["ptx"]


@pytest.mark.skipif(IN_INTERPRETER or DEVICE != "cpu", reason="is what starts this")
def test_triton_kernel_in_its_interpreter():
    if not find_spec("triton"):
        pytest.skip("triton is not installed (it has no wheel for this platform)")
    files = [__file__, str(Path(__file__).with_name("test_linear_loss.py"))]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *files]
    command += ["-k", "test_kernels or errors"]
    result = subprocess.run(
        command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=600
    )
    assert result.returncode == 0, result.stdout[-3000:]
    assert " passed" in result.stdout
