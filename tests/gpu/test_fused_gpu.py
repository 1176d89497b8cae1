"""What the kernel and the fused loss do on a CUDA device alone: `HF_TST_TEST_DEVICE=cuda python -m pytest tests/gpu`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from hf_tst import count_target_bags, linear_multi_hot_cross_entropy, offset_weights
from hf_tst.losses.linear import CHUNK_BYTES

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        os.environ.get("HF_TST_TEST_DEVICE") != "cuda",
        reason="needs a CUDA device, and HF_TST_TEST_DEVICE=cuda",
    ),
]


def test_the_kernel_tests_pass_on_the_device():
    file = str(Path(__file__).parents[1] / "test_kernels.py")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-m", "full or not full", file]
    result = subprocess.run(
        command, env=os.environ | {"HF_TST_TEST_DEVICE": "cuda"}, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout[-3000:]


@pytest.mark.parametrize("bag_size", [1, 16])
def test_memory_is_under_a_tenth_of_the_logits(bag_size):
    rows, size, vocabulary = 8192, 256, 128_256
    hidden = torch.randn(rows, size, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(vocabulary, size, device="cuda", requires_grad=True)
    labels = torch.randint(0, vocabulary, (rows, bag_size), device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with torch.autocast("cuda", dtype=torch.bfloat16):
        linear_multi_hot_cross_entropy(hidden, weight, labels).backward()
    gradients = hidden.numel() * 2 + weight.numel() * 4
    assert torch.cuda.max_memory_allocated() - before - gradients < 0.1 * 4 * rows * vocabulary


@pytest.mark.parametrize("rows_per_chunk", [100, 512])
def test_bfloat16_errs_no_more_than_the_loop(rows_per_chunk, monkeypatch):
    monkeypatch.setitem(CHUNK_BYTES, "cuda", rows_per_chunk * 5000 * 2)
    generator = torch.Generator("cuda").manual_seed(0)
    hidden = torch.randn(512, 64, device="cuda", generator=generator).bfloat16().requires_grad_()
    weight = torch.randn(5000, 64, device="cuda", generator=generator).bfloat16().requires_grad_()
    labels = torch.randint(0, 5000, (512, 6), device="cuda", generator=generator)

    def loop(hidden, weight):
        logits = F.linear(hidden, weight)
        return sum(F.cross_entropy(logits, column) for column in labels.unbind(-1)) / 6

    exact_inputs = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    exact = torch.autograd.grad(loop(*exact_inputs), exact_inputs)
    ours = torch.autograd.grad(linear_multi_hot_cross_entropy(hidden, weight, labels), (hidden, weight))
    naive = torch.autograd.grad(loop(hidden, weight), (hidden, weight))
    for a, b, c in zip(ours, naive, exact, strict=True):
        assert (a.double() - c).norm() <= 1.05 * (b.double() - c).norm()


def test_nothing_waits_for_the_device():
    hidden = torch.randn(64, 16, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(500, 16, device="cuda", requires_grad=True)
    labels = torch.randint(0, 500, (64, 4), device="cuda")
    weights = offset_weights("power_law", 4)  # on the host, as the trainer has them

    def step():
        for divisor in (None, 64.0, count_target_bags(labels, weights=weights)):
            with torch.autocast("cuda", dtype=torch.bfloat16):
                loss = linear_multi_hot_cross_entropy(
                    hidden, weight, labels, weights=weights, num_items_in_batch=divisor
                )
            loss.backward()

    step()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_labels_outside_the_vocabulary_stop_the_device():
    code = (
        "import torch; from hf_tst import linear_multi_hot_cross_entropy as loss\n"
        "h, w = torch.randn(4, 8, device='cuda'), torch.randn(9, 8, device='cuda')\n"
        "loss(h, w, torch.full((4, 2), 9, device='cuda')); torch.cuda.synchronize()\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode != 0
    assert "assert" in result.stderr
