"""What the kernel and the fused loss do on a CUDA device alone: `HF_TST_TEST_DEVICE=cuda python -m pytest tests/gpu`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hf_tst import linear_multi_hot_cross_entropy

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        os.environ.get("HF_TST_TEST_DEVICE") != "cuda",
        reason="needs a CUDA device, and HF_TST_TEST_DEVICE=cuda",
    ),
]


def test_the_kernel_tests_pass_on_the_device():
    command = [sys.executable, "-m", "pytest", "-q", "-x", str(Path(__file__).parents[1] / "test_kernels.py")]
    result = subprocess.run(
        command, env=os.environ | {"HF_TST_TEST_DEVICE": "cuda"}, capture_output=True, text=True, timeout=900
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


def test_labels_outside_the_vocabulary_stop_the_device():
    code = (
        "import torch; from hf_tst import linear_multi_hot_cross_entropy as loss\n"
        "h, w = torch.randn(4, 8, device='cuda'), torch.randn(9, 8, device='cuda')\n"
        "loss(h, w, torch.full((4, 2), 9, device='cuda')); torch.cuda.synchronize()\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode != 0
    assert "assert" in result.stderr
