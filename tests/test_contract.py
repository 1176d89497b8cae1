"""What TSTTrainer takes from inside Transformers and accelerate: signatures of the installed version, and what breaks.

A name that is gone, or takes other arguments, is red here, with the sentence that says what to look at.
"""

import ast
import inspect
from pathlib import Path

import accelerate
import pytest
import transformers
from conftest import make_blocks
from transformers import PreTrainedModel, Trainer
from transformers.core_model_loading import revert_weight_conversion

from hf_tst import TSTTrainer

PACKAGE = Path(__file__).parent.parent / "hf_tst"

# Methods of Trainer that begin with an underscore: their arguments, and what breaks without them.
METHODS = {
    "_hp_search_setup": (
        "trial",
        "sets the arguments of a trial; without it the losses and the checks of a search are those of its first arguments",
    ),
    "_get_dataloader": (
        "dataset, description, batch_size, sampler_fn, is_training, dataloader_key",
        "makes the loader of the rows, with all dataloader_ arguments; without it no run with superposition starts",
    ),
    "_prepare_inputs": (
        "inputs",
        "is given every batch; without it an id that has no embedding in a batch of one's own loader is an IndexError",
    ),
    "_get_grad_norm": (
        "model, grad_norm",
        "is called once per optimizer step, in front of it; without it a gradient that is not finite is trained on",
    ),
    "_determine_best_metric": (
        "metrics, trial",
        "decides alone what save_strategy='best' saves; without it the checkpoint of the switch is not written",
    ),
    "_load_best_model": (
        "",
        "loads the best model; without it the experts of the best model stay those of the last",
    ),
    "_load_from_checkpoint": (
        "resume_from_checkpoint, model",
        "loads the weights of a resumed run; without it experts and extra heads stay as they were made",
    ),
    "_load_optimizer_and_scheduler": (
        "checkpoint",
        "loads the optimizer; without it FSDP refuses a checkpoint of superposition with extra heads",
    ),
    "_save_checkpoint": (
        "model, trial",
        "writes a checkpoint; without it they are written in place, unchecked, and without data_position.json",
    ),
    "_get_train_sampler": (
        "train_dataset",
        "is overridden to bring an own sampler; without it such a sampler is not seen, and its order is lost",
    ),
    "_remove_unused_columns": (
        "dataset, description",
        "is asked where it is overridden; without it the columns that it keeps are dropped in superposition",
    ),
    "_get_collator_with_removed_columns": (
        "data_collator, description",
        "may be overridden to keep columns; without it they are dropped in superposition",
    ),
    "_get_output_dir": ("trial", "says where checkpoints go; without it they are written in place"),
    "_push_from_checkpoint": (
        "checkpoint_folder",
        "pushes a checkpoint; without it the push looks for a folder that has another name when it is complete",
    ),
    "_save": (
        "output_dir, state_dict",
        "writes gathered weights; without it a sharded model is not saved whole",
    ),
    "_set_signature_columns_if_needed": (
        "",
        "finds out what the model takes; without it rows have no columns",
    ),
}
# Attributes that a trainer has, and what breaks without them.
ATTRIBUTES = {
    "_train_batch_size": "is the batch size after auto_find_batch_size; without it the plan is made for another one",
    "_signature_columns": "has the columns that the model takes; without it rows have no columns",
}
# Attributes of other classes, and what breaks without them.
OF_MODELS = {
    "_init_weights": "makes new random weights; without it reinit_at_switch fails",
}


def arguments(function):
    return ", ".join(name for name in inspect.signature(function).parameters if name != "self")


@pytest.mark.parametrize("name", METHODS)
def test_a_method_takes_what_it_took(name):
    expected, breaks = METHODS[name]
    found = getattr(Trainer, name, None)
    versions = f"transformers {transformers.__version__}, accelerate {accelerate.__version__}"
    assert found is not None, f"{versions}: Trainer.{name} is gone. It {breaks}."
    assert arguments(found) == expected, f"{versions}: Trainer.{name} takes other arguments. It {breaks}."


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_an_attribute_is_there(llama, make_args, name):
    trainer = Trainer(llama, make_args(tst_phase_ratio=0), train_dataset=make_blocks(4))
    assert hasattr(trainer, name), f"{name} {ATTRIBUTES[name]}"


def test_what_models_and_loaders_have(llama, make_args):
    for name, breaks in OF_MODELS.items():
        assert callable(getattr(PreTrainedModel, name, None)), f"{name} {breaks}"
    assert arguments(revert_weight_conversion) == "model, state_dict", "experts are not found in a checkpoint"
    loader = Trainer(llama, make_args(tst_phase_ratio=0), train_dataset=make_blocks(4)).get_train_dataloader()
    # Without it resumed runs with dropout draw other numbers.
    assert loader.base_dataloader.generator is None


def test_no_other_private_name_is_used():
    """Of those that Trainer has, in what is called and overridden."""
    private = {name for name in vars(Trainer) if name.startswith("_") and not name.startswith("__")}
    private |= {"_signature_columns", "_train_batch_size"}
    used = set()
    for path in [*(PACKAGE / "checkpoints").rglob("*.py"), *(PACKAGE / "training").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            # A constant is the name of a method that may be overridden.
            field = {ast.Attribute: "attr", ast.Constant: "value"}.get(type(node), "name")
            if (name := getattr(node, field, None)) in private:
                used.add(name)
    assert used == {*METHODS, *ATTRIBUTES}


# Methods that users call and override

NEWER = {"private"}  # arguments that older supported versions do not have


def parameters(function):
    found = inspect.signature(function).parameters.values()
    return [(p.name, p.kind, p.default) for p in found]


@pytest.mark.parametrize(
    "name", [name for name in vars(TSTTrainer) if not name.startswith("_") and hasattr(Trainer, name)]
)
def test_an_overridden_method_takes_what_trainer_s_takes(name):
    ours, theirs = parameters(getattr(TSTTrainer, name)), parameters(getattr(Trainer, name))
    known = {parameter[0] for parameter in theirs}
    assert [p for p in ours if p[0] in known or p[0] not in NEWER] == theirs


def test_a_subclass_may_hand_on_arguments_by_position(llama, make_args):
    class Own(TSTTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

        def training_step(self, model, inputs, num_items_in_batch=None):
            return super().training_step(model, inputs, num_items_in_batch)

        def evaluation_loop(
            self,
            dataloader,
            description,
            prediction_loss_only=None,
            ignore_keys=None,
            metric_key_prefix="eval",
        ):
            return super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )

    data = {"train_dataset": make_blocks(200), "eval_dataset": make_blocks(4)}
    trainer = Own(llama, make_args(), **data)
    trainer.train()
    assert trainer.state.global_step == 10
    assert trainer.evaluate()["eval_loss"] > 0
