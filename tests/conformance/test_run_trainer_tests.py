"""The runner of Transformers' own tests, on a checkout with a few tests in their manner."""

import json

import run_trainer_tests
import yaml

TESTS = """
import unittest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments, is_torch_available
if is_torch_available():
    from transformers import Trainer as HFTrainer

class Regression(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.a = torch.nn.Parameter(torch.zeros(()))
        self.config = None

    def forward(self, input_x, labels=None, **kwargs):
        y = input_x * self.a
        return (torch.nn.functional.mse_loss(y, labels), y)

def run(model, rows):
    args = TrainingArguments("out", max_steps=4, use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True)
    HFTrainer(model, args, train_dataset=rows).train()
    return args

class TrainerTest(unittest.TestCase):
    def test_language_model_trains(self):
        config = LlamaConfig(vocab_size=9, hidden_size=4, intermediate_size=4, num_hidden_layers=1, num_attention_heads=1)
        run(LlamaForCausalLM(config), [{"input_ids": [i % 9] * 4, "labels": [i % 9] * 4} for i in range(80)])

    def test_regression_trains(self):
        run(Regression(), [{"input_x": 1.0, "labels": 2.0}] * 40)

    def test_arguments_are_those_of_trainer(self):
        self.assertFalse(hasattr(run(Regression(), [{"input_x": 1.0, "labels": 2.0}] * 40), "tst_bag_size"))

    def test_fails_with_trainer_too(self):
        self.fail()
"""
REFUSED = [{"reason": "no language model", "refusal": "needs a PreTrainedModel"}]
ARGUMENTS = "TrainerTest.test_arguments_are_those_of_trainer"
KNOWN = [{"reason": "an argument of ours", "modes": ["r=0"], "tests": [ARGUMENTS.split(".")[1]]}]


def test_what_differs_must_be_on_the_list(tmp_path, capsys):
    folder = tmp_path / "checkout" / "tests" / "trainer"
    folder.mkdir(parents=True)
    (folder / "test_tiny.py").write_text(TESTS)
    (tmp_path / "expected.yaml").write_text(yaml.safe_dump(REFUSED))
    paths = ["--expected", str(tmp_path / "expected.yaml"), "--report", str(tmp_path / "report.json")]
    assert run_trainer_tests.main([str(tmp_path / "checkout"), *paths]) == 1
    assert f"r=0: {ARGUMENTS}" in capsys.readouterr().out
    found = json.loads((tmp_path / "report.json").read_text())
    regression = "TrainerTest.test_regression_trains"
    assert {mode: sorted(tests) for mode, tests in found.items()} == {
        "r=0": [ARGUMENTS],
        "r=0.5": [ARGUMENTS, regression],
    }
    for mode, tests in found.items():
        assert all(run_trainer_tests.is_expected(mode, *item, REFUSED + KNOWN) for item in tests.items())
    assert not run_trainer_tests.is_expected("r=0.5", ARGUMENTS, "", REFUSED + KNOWN)
