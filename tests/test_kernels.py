"""The kernels against s ordinary cross entropies in float64, on the CPU: Triton's runs in its interpreter.

Triton decides when it is first imported whether to interpret, so its cases run in a process of their own.
"""

import math
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from versions import fails_before

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Softcap, scale of the logits, and their spread before it.
TRANSFORMS = [(None, 1.0, 3.0), (2.5, 1.0, 3.0), (None, 0.25, 1e4), (30.0, 2.0, 0.01), (5.0, 3.0, 100.0)]
DEVICE = os.environ.get("HF_TST_TEST_DEVICE", "cpu")
IN_INTERPRETER = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture
def kernel():
    from hf_tst.losses.kernels import select_kernel

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


def assert_no_less_exact(ours, single, exact, bits):
    """Row by row, the error against float64 is at most twice that of the loop in float32, and `bits`.

    Twice, and a bit, because the loop may hit the exact value by luck, above all where a row has few columns.
    """
    errors, of_the_loop = (
        (found.double() - exact).abs().reshape(len(exact), -1).amax(1) for found in (ours.cpu(), single)
    )
    allowed = 2 * of_the_loop + bits
    # A GPU's exponential and division err in two bits, where the CPU's and the interpreter's are exact.
    if DEVICE == "cuda":
        allowed = 4 * allowed
    assert (errors <= allowed).all(), f"errors {errors.tolist()} exceed {allowed.tolist()}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("softcap", "logit_scale", "spread"), TRANSFORMS)
@pytest.mark.parametrize("bag_size", [1, 2, 3, 16])
@pytest.mark.parametrize("vocabulary", [1, 5, 97, 9001])
def test_no_less_exact_than_the_loop(kernel, vocabulary, bag_size, softcap, logit_scale, spread, dtype):
    logits, labels, weights = make_case(5, vocabulary, bag_size, dtype, spread)
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
    # A last bit of what is added up; the bits of s summands add up as in a random walk.
    bit = math.sqrt(bag_size) * torch.finfo(torch.float32).eps
    weight = ((labels != -100) * weights).sum(1).double()
    scores = (logits.double() * logit_scale).abs().amax(1)
    rounded = 0 if logit_scale == 1 and softcap is None else scores.clamp_max(softcap or math.inf)
    assert_no_less_exact(losses, single, exact, bit * (weight * (1 + rounded) + exact))
    bits = bit * 0.5 * logit_scale * weight
    if dtype == torch.bfloat16 and IN_INTERPRETER:  # which cuts off where a GPU rounds
        bits = bits + torch.finfo(dtype).eps * exact_gradient.abs().amax(1)
    assert_no_less_exact(rows, (0.5 * single_gradient).to(dtype), 0.5 * exact_gradient, bits)
    assert wide[:, vocabulary:].abs().max() == 0
    assert losses[-1] == 0
    assert rows[-1].abs().max() == 0


def test_a_cap_far_above_the_logits_changes_nothing(kernel):
    """A tanh that cancels would lose all digits of what is small beside the cap."""
    logits, labels, weights = make_case(6, 40, 3, torch.float32)
    capped, plain = logits.clone().to(DEVICE), logits.clone().to(DEVICE)
    given = (labels.to(DEVICE), weights.to(DEVICE))
    scale = torch.ones((), device=DEVICE)
    losses = kernel(capped, *given, gradient_scale=scale, softcap=1e6)
    torch.testing.assert_close(losses, kernel(plain, *given, gradient_scale=scale), rtol=2e-6, atol=1e-6)
    torch.testing.assert_close(capped, plain, rtol=2e-6, atol=1e-6)


def test_only_weights_of_zero_are_left_out(kernel):
    logits, labels, _ = make_case(6, 40, 3, torch.float32)
    weights = torch.tensor([1.0, -1.0, 0.5])
    labels[0] = torch.tensor([3, 4, -100])  # weights that sum to 0 are no missing target
    ours = logits.clone().to(DEVICE)
    losses = kernel(ours, labels.to(DEVICE), weights.to(DEVICE), gradient_scale=torch.ones((), device=DEVICE))
    exact, gradient = naive(logits.double(), labels, weights, None, 1.0)
    torch.testing.assert_close(losses.cpu(), exact.float())
    torch.testing.assert_close(ours.cpu(), gradient.float())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_rows(kernel, dtype):
    labels = torch.zeros(0, 2, dtype=torch.long, device=DEVICE)
    weights, scale = torch.ones(2, device=DEVICE), torch.ones((), device=DEVICE)
    logits = torch.zeros(0, 7, dtype=dtype, device=DEVICE)
    assert kernel(logits, labels, weights, gradient_scale=scale).shape == (0,)


def test_rows_may_lie_further_apart_than_32_bits_count(kernel):
    case, labels, weights = make_case(3, 40, 2, torch.bfloat16)
    # Of the 4 GiB only what is touched becomes memory.
    far = torch.empty(2**31 + 48, dtype=torch.bfloat16, device=DEVICE).as_strided((3, 40), (2**30, 1))
    # Rows as well aligned as the far ones: Triton compiles the same order of sums.
    near = torch.empty(3, 48, dtype=torch.bfloat16, device=DEVICE)[:, :40]
    near.copy_(case)
    far.copy_(near)
    given = (labels.to(DEVICE), weights.to(DEVICE))
    scale = torch.ones((), device=DEVICE)
    assert torch.equal(kernel(far, *given, gradient_scale=scale), kernel(near, *given, gradient_scale=scale))
    assert torch.equal(far, near)


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_what_is_between_aligned_rows_does_not_count(kernel, softcap):
    logits, labels, weights = make_case(5, 40, 3, torch.float32)
    padded = torch.full((5, 48), float("nan"), device=DEVICE)[:, :40]
    apart = torch.zeros(5, 41, device=DEVICE)[:, :40]
    given = (labels.to(DEVICE), weights.to(DEVICE))
    scale = torch.ones((), device=DEVICE)
    losses = [
        kernel(rows.copy_(logits), *given, gradient_scale=scale, softcap=softcap) for rows in (padded, apart)
    ]
    torch.testing.assert_close(*losses, rtol=2e-6, atol=1e-6)
    torch.testing.assert_close(padded, apart, rtol=2e-6, atol=1e-6)


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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_rows_without_targets_get_zeros_whatever_they_hold(kernel, softcap, dtype):
    logits = torch.randn(5, 40).to(dtype)
    logits[1:] = torch.tensor([float("nan"), float("inf"), -float("inf"), 1.0]).repeat(10)
    labels = torch.tensor([[3, 4], [-100, -100], [-100, 5], [-100, -100], [-100, 0]])
    ours, weights = logits.clone().to(DEVICE), torch.tensor([1.0, 0.0], device=DEVICE)
    scale = torch.ones((), device=DEVICE)
    losses = kernel(ours, labels.to(DEVICE), weights, gradient_scale=scale, softcap=softcap)
    assert losses[0] > 0
    assert ours[0].abs().max() > 0
    assert not losses[1:].any()
    assert not ours[1:].any()


def test_huge_and_infinite_logits(kernel):
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


def accesses_of_logits(ptx):
    """What the kernel does with bfloat16 in global memory, in its order: "load" or "store" and the address, or "barrier"."""
    pattern = r"(ld|st)\.global\.b16 .*?\[ (%\w+) \+ 0 \]|(bar\.sync)"
    kinds = {"ld": "load", "st": "store"}
    return [
        ("barrier", None) if found[3] else (kinds[found[1]], found[2]) for found in re.finditer(pattern, ptx)
    ]


def compile_kernel(architecture, dtype, vocabulary, bag_size, has_softcap, is_aligned):
    """The Triton kernel as machine code, for which no GPU is needed."""
    triton = pytest.importorskip(
        "triton", reason="triton is not installed (it has no wheel for this platform)"
    )
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from hf_tst.losses.kernels.triton_multi_hot import launch_options, multi_hot_kernel

    names = multi_hot_kernel.arg_names
    signature = dict.fromkeys(names, "constexpr")
    signature |= {"logits_pointer": f"*{dtype}", "labels_pointer": "*i64"}
    signature |= dict.fromkeys(("weights_pointer", "scale_pointer", "losses_pointer"), "*fp32")
    signature |= dict.fromkeys(("row_stride", "vocabulary", "width", "bag_size", "ignore_index"), "i32")
    signature |= dict.fromkeys(("logit_scale", "softcap"), "fp32")
    constants = launch_options(vocabulary, bag_size)
    options = {"num_warps": constants.pop("num_warps")}
    constants |= {"HAS_SOFTCAP": has_softcap, "WRITE_GRADIENT": True}
    aligned = ["logits_pointer", "row_stride", "width"] if is_aligned else []
    aligned += ["vocabulary"] if is_aligned and vocabulary % 16 == 0 else []
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(multi_hot_kernel, signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)


@pytest.mark.skipif(
    IN_INTERPRETER or DEVICE != "cpu", reason="needs no device: compiles for one that is not there"
)
@fails_before("torch", "2.13", "the Triton that belongs to it spills some registers")
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("vocabulary", [32_000, 50_257, 128_256])
@pytest.mark.parametrize("has_softcap", [False, True])
def test_triton_kernel_spills_no_registers(has_softcap, vocabulary, dtype, tmp_path):
    """As it is launched on an H100: two programs or more fit on a multiprocessor, and a thread moves 16 bytes at a time."""
    pytest.importorskip(
        "triton", minversion="3.3", reason="older versions write attributes of arguments otherwise"
    )
    compiled = compile_kernel(90, dtype, vocabulary, 16, has_softcap, is_aligned=True)
    from triton.backends import nvidia

    (tmp_path / "kernel.cubin").write_bytes(compiled.asm["cubin"])
    tool = Path(nvidia.__path__[0]) / "bin" / "cuobjdump"
    command = [tool, "-res-usage", tmp_path / "kernel.cubin"]
    usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    used = {name: int(number) for name, number in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
    print(f"\n{dtype}, V = {vocabulary}{', capped' if has_softcap else ''}: {used}")
    assert used["STACK"] == used["LOCAL"] == 0  # where registers would be spilled to
    threads = 32 * compiled.metadata.num_warps
    assert used["REG"] * threads * 2 <= 65_536
    assert used["SHARED"] * 2 <= 227 * 1024
    for sweep in ("ld", "st"):
        assert f"{sweep}.global.v4.b32" in compiled.asm["ptx"]


@pytest.mark.skipif(
    IN_INTERPRETER or DEVICE != "cpu", reason="needs no device: compiles for one that is not there"
)
@pytest.mark.parametrize(
    ("architecture", "bag_size", "has_softcap"),
    [(80, 1, False), (80, 16, True), (90, 4, False), (90, 1, True)],
)
def test_triton_kernel_compiles_for_gpus(architecture, bag_size, has_softcap):
    """Down to machine code; the warps of a program wait for each other where they must."""
    compiled = compile_kernel(architecture, "bf16", 128_256, bag_size, has_softcap, is_aligned=False)
    assert compiled.asm["cubin"]

    accesses = accesses_of_logits(compiled.asm["ptx"])
    stored = {address for kind, address in accesses if kind == "store"}
    # The first sweep only loads. So the first address that is also stored to is that of the targets' logits.
    gather = next(i for i, (kind, at) in enumerate(accesses) if kind == "load" and at in stored)
    sweep = next(i for i in range(gather, len(accesses)) if accesses[i][0] == "store")
    scatter = accesses.index(("store", accesses[gather][1]))
    end_of_sweep = max(i for i in range(scatter) if accesses[i][0] == "store")
    assert gather < sweep <= end_of_sweep < scatter
    assert ("barrier", None) in accesses[gather:sweep]
    assert ("barrier", None) in accesses[end_of_sweep:scatter]


@pytest.mark.skipif(IN_INTERPRETER or DEVICE != "cpu", reason="is what starts this")
def test_triton_kernel_in_its_interpreter():
    if not find_spec("triton"):
        pytest.skip("triton is not installed (it has no wheel for this platform)")
    files = [__file__, str(Path(__file__).with_name("test_linear_loss.py"))]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-m",
        "full or not full",
        "-p",
        "no:cacheprovider",
        *files,
    ]
    command += ["-k", "test_kernels or errors"]
    result = subprocess.run(
        command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout[-3000:]
    assert " passed" in result.stdout


@pytest.mark.parametrize("writes_gradient", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_torch_kernel_is_the_same_in_tiles(dtype, writes_gradient, monkeypatch):
    from hf_tst.losses.kernels import torch_multi_hot

    logits, labels, weights = make_case(9, 20, 3, dtype)
    found = []
    for elements in (20 * 9, 20 * 2):  # one tile, and five
        monkeypatch.setitem(torch_multi_hot._TILE_ELEMENTS, "cpu", elements)
        rows = logits.clone()
        losses = torch_multi_hot.multi_hot_loss_and_gradient(
            rows,
            labels,
            weights,
            gradient_scale=torch.tensor(0.5),
            softcap=2.5,
            write_gradient=writes_gradient,
        )
        found.append((losses, rows))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)
