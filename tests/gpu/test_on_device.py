"""What training rests on, on the device that trains and at sizes that are trained.

`HF_TST_TEST_DEVICE=cuda python -m pytest tests/gpu/test_on_device.py`; without the variable, the same in small on the CPU.
"""

import math
import os

import pytest
import test_kernels
import torch
from conftest import losses, make_blocks, make_model
from torch.nn.functional import log_softmax

from hf_tst import TSTTrainer, linear_multi_hot_cross_entropy, token_superposition
from hf_tst.bags.folding import fold_into_bags, next_bag_labels
from hf_tst.losses.kernels import select_kernel

DEVICE = os.environ.get("HF_TST_TEST_DEVICE", "cpu")
ON_GPU = DEVICE != "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
VOCABULARIES = [32_000, 128_256] if ON_GPU else [1000, 4008]
ROWS = 1100 if ON_GPU else 40  # several chunks
SWITCH = 5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bag_size", [1, 6, 16])
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_kernel_is_no_less_exact_than_the_loop(vocabulary, bag_size, dtype):
    kernel = select_kernel(torch.device(DEVICE))
    assert not ON_GPU or "triton" in kernel.__module__
    test_kernels.test_no_less_exact_than_the_loop(kernel, vocabulary, bag_size, None, 1.0, 3.0, dtype)


def log_softmax_loss(hidden, weight, labels):
    """The multi-hot loss from all logits, with a softmax in float32 at least."""
    logits = hidden @ weight.t()
    log_probabilities = log_softmax(logits if logits.dtype == torch.float64 else logits.float(), dim=-1)
    valid = labels != -100
    return -(log_probabilities.gather(-1, labels * valid) * valid).sum() / valid.sum()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bag_size", [1, 6, 16])
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_operator_errs_as_little_as_a_log_softmax(vocabulary, bag_size, dtype):
    generator = torch.Generator(DEVICE).manual_seed(0)
    size = 64

    def normal(*shape):
        numbers = torch.randn(*shape, device=DEVICE, generator=generator) * size**-0.5
        return numbers.to(dtype).requires_grad_()

    hidden, weight = normal(ROWS, size), normal(vocabulary, size)
    labels = torch.randint(0, vocabulary, (ROWS, bag_size), device=DEVICE, generator=generator)
    labels[0] = vocabulary - 1  # one token, as often as there are places
    labels[1::7, bag_size // 2 :] = -100
    labels[2::5] = -100

    def loss_and_gradients(function, *inputs):
        loss = function(*inputs, labels)
        return [loss.detach(), *torch.autograd.grad(loss, inputs)]

    exact = loss_and_gradients(
        log_softmax_loss, *(x.detach().double().requires_grad_() for x in (hidden, weight))
    )
    ours = loss_and_gradients(linear_multi_hot_cross_entropy, hidden, weight)
    naive = loss_and_gradients(log_softmax_loss, hidden, weight)
    # Two float32 sums of the same numbers in another order: either may err more. In lower precision the parts of the
    # weight's gradient may be rounded before they are added up, and their sum again.
    factor = 2 if dtype == torch.float32 else 1.5
    for name, a, b, c in zip(("loss", "hidden", "weight"), ours, naive, exact, strict=True):
        assert (a.double() - c).norm() <= factor * (b.double() - c).norm() + 1e-6 * c.norm(), name


@pytest.mark.parametrize("bag_size", [1, 6])
def test_fused_model_errs_no_more_than_the_unfused_under_autocast(bag_size):
    model = make_model("llama", vocab_size=VOCABULARIES[0], hidden_size=64, head_dim=32).to(DEVICE)
    tokens = torch.randint(0, VOCABULARIES[0], (4, 16 * bag_size), device=DEVICE)
    bags = fold_into_bags(tokens, bag_size)

    def gradient(fused, autocast):
        model.zero_grad()
        with token_superposition(model, bag_size, fused_loss=fused):
            with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
                loss = model(input_ids=bags, labels=next_bag_labels(bags)).loss
            loss.backward()
        return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])

    exact = gradient("off", autocast=False)
    unfused = (gradient("off", autocast=True) - exact).norm()
    assert unfused > 1e-4 * exact.norm()  # autocast is at work
    assert (gradient("on", autocast=True) - exact).norm() <= 1.1 * unfused


def train(make_args, resume=None, on_gpu=ON_GPU, **options):
    """Five steps of superposition and five of recovery, or more; the trainer."""
    options = {"max_steps": 2 * SWITCH, "tst_phase_ratio": 0.5, "learning_rate": 1e-3} | options
    model = make_model("llama", hidden_size=64, head_dim=32)
    trainer = TSTTrainer(model, make_args(use_cpu=not on_gpu, **options), train_dataset=make_blocks(400))
    trainer.train(resume_from_checkpoint=resume)
    assert {parameter.device.type for parameter in model.parameters()} == {DEVICE if on_gpu else "cpu"}
    return trainer


@pytest.mark.parametrize("bf16", [False, True])
def test_both_phases_train_as_on_the_cpu(make_args, bf16):
    trainer = train(make_args, bf16=bf16)
    found = losses(trainer)
    assert found[0] == pytest.approx(math.log(trainer.model.config.vocab_size), rel=0.02)
    sizes = [entry["tst_current_bag_size"] for entry in trainer.state.log_history if "loss" in entry]
    assert sizes == [trainer.args.tst_bag_size] * SWITCH + [1] * SWITCH
    expected = losses(train(make_args, on_gpu=False, tst_fused_loss="off"))
    torch.testing.assert_close(found, expected, rtol=0, atol=0.03 if bf16 else 1e-3)


@pytest.mark.parametrize("bf16", [False, True])
def test_resume_at_the_switch(make_args, tmp_path, bf16):
    whole = train(make_args, bf16=bf16, save_strategy="steps", save_steps=SWITCH)
    resumed = train(make_args, resume=str(tmp_path / "run" / f"checkpoint-{SWITCH}"), bf16=bf16)
    # On a GPU sums are made in another order from run to run.
    tolerance = {"rtol": 1e-3, "atol": 1e-3} if ON_GPU else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(losses(resumed), losses(whole), **tolerance)
    weights = zip(resumed.model.parameters(), whole.model.parameters(), strict=True)
    assert all(torch.allclose(one, other, **tolerance) for one, other in weights)


@pytest.mark.parametrize("fused", ["on", "off"])
def test_compiled_training_is_that_of_the_model(make_args, fused):
    options = {"bf16": True, "max_steps": 20, "tst_fused_loss": fused}
    backend = (
        "inductor" if ON_GPU else "eager"
    )  # inductor takes a minute on two cores; test_compile.py has it
    compiled = train(make_args, torch_compile=True, torch_compile_backend=backend, **options)
    torch.testing.assert_close(losses(compiled), losses(train(make_args, **options)), rtol=0, atol=0.03)
