"""What TSTTrainer refuses, before the first step."""

import copy
import math
from types import MethodType, SimpleNamespace

import datasets
import pytest
import torch
from accelerate.utils import TorchDynamoPlugin
from conftest import BLOCK_LENGTH, VOCAB_SIZE, losses, make_blocks, make_model
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from transformers import CONFIG_MAPPING, PretrainedConfig, PreTrainedModel, TrainerCallback, TrainingArguments
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import CausalLMOutputWithPast

from hf_tst import (
    DataCollatorForTokenSuperposition,
    TSTError,
    TSTTrainer,
    fused_next_token_loss,
    token_superposition,
)
from hf_tst.models.head import computes_own_loss
from hf_tst.training.refusals import check_tokenizer, check_trainer


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ([], "empty"),
        ([{"input_ids": [1] * 12}] * 40 + [{"input_ids": [1] * 11}], "equal length"),
        ([{"input_ids": [1] * 12, "attention_mask": [1] * 11 + [0]}] * 60, "padded"),
        ([{"input_ids": [1] * 12}] * 37, "needs 38 blocks .* has 37"),
        ([{"tokens": [1] * 12}] * 60, "input_ids"),
    ],
)
def test_bad_data_is_refused_before_the_first_step(llama, make_args, blocks, message):
    steps = []
    llama.register_forward_pre_hook(lambda *_: steps.append(1))
    trainer = TSTTrainer(llama, make_args(), train_dataset=blocks)
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert not steps


class Tokenizer:
    """What the trainer asks of a tokenizer."""

    def __init__(self, **special):
        self.pad_token_id = self.bos_token_id = self.eos_token_id = self.unk_token_id = None
        vars(self).update(special)

    def save_pretrained(self, folder):
        pass


def test_blocks_that_end_in_padding_are_refused_unless_it_also_ends_documents(llama, make_args):
    blocks = [{"input_ids": [*block["input_ids"][:-2], 96, 96]} for block in make_blocks(200)]

    def train(**special):
        model = copy.deepcopy(llama)
        trainer = TSTTrainer(model, make_args(), train_dataset=blocks, processing_class=Tokenizer(**special))
        return trainer.train().global_step

    assert train(pad_token_id=96, eos_token_id=96) == 10
    assert train(pad_token_id=95) == 10
    with pytest.raises(ValueError, match="padding token 96"):
        train(pad_token_id=96, eos_token_id=95)


def test_plain_arguments_are_refused(llama, tmp_path):
    with pytest.raises(ValueError, match="needs TSTTrainingArguments"):
        TSTTrainer(llama, TrainingArguments(output_dir=str(tmp_path)), train_dataset=make_blocks(4))


@pytest.mark.parametrize("plain", [{}, {"tst_phase_ratio": 0, "tst_fused_loss": "on"}], ids=["TST", "fused"])
def test_data_parallel_is_refused_where_the_loss_is_replaced(llama, make_args, plain):
    args = make_args(**plain)
    assert args.n_gpu <= 1
    args._n_gpu = 2
    with pytest.raises(ValueError, match="accelerate launch"):
        TSTTrainer(llama, args, train_dataset=make_blocks(4))


def test_a_model_that_is_wrapped_for_data_parallel_is_refused(llama, make_args):
    args = make_args(remove_unused_columns=False)
    with pytest.raises(TSTError, match="pass the model itself"):
        TSTTrainer(nn.DataParallel(llama), args, train_dataset=make_blocks(4))


def test_data_parallel_is_allowed_in_plain_training(llama, make_args):
    args = make_args(tst_phase_ratio=0)
    assert args.n_gpu <= 1
    args._n_gpu = 2
    TSTTrainer(llama, args, train_dataset=make_blocks(4))  # raises nothing


def test_a_model_that_is_spread_over_devices_is_not_data_parallel(llama, make_args):
    args = make_args()
    assert args.n_gpu <= 1
    args._n_gpu = 2
    llama.hf_device_map = {"model": 0, "lm_head": 1}
    TSTTrainer(llama, args, train_dataset=make_blocks(4))  # raises nothing


def test_fsdp1_is_refused(llama, make_args):
    trainer = TSTTrainer(llama, make_args(tst_phase_ratio=0), train_dataset=make_blocks(4))
    trainer.args = make_args()
    trainer.is_fsdp_enabled = True
    state = SimpleNamespace(fsdp_plugin=SimpleNamespace(fsdp_version=1))
    trainer.accelerator = SimpleNamespace(state=state, parallelism_config=None)
    with pytest.raises(ValueError, match="fsdp_version: 2"):
        check_trainer(trainer)
    state.fsdp_plugin.fsdp_version = 2
    check_trainer(trainer)  # raises nothing


def test_fp8_is_refused_where_the_loss_is_replaced(llama, make_args):
    trainer = TSTTrainer(llama, make_args(), train_dataset=make_blocks(4))
    trainer.accelerator = SimpleNamespace(mixed_precision="fp8", state=None, parallelism_config=None)
    with pytest.raises(TSTError, match="use bf16"):
        check_trainer(trainer)
    plugin = TorchDynamoPlugin(backend="eager", use_regional_compilation=True)
    trainer.accelerator = SimpleNamespace(
        state=SimpleNamespace(dynamo_plugin=plugin), parallelism_config=None
    )
    with pytest.raises(TSTError, match="regional compilation"):
        check_trainer(trainer)
    trainer.args = make_args(tst_phase_ratio=0)
    check_trainer(trainer)  # raises nothing


def test_what_would_replace_the_loss_or_the_bags_is_refused(llama, make_args):
    with pytest.raises(ValueError, match="compute_loss_func"):
        TSTTrainer(llama, make_args(), train_dataset=make_blocks(4), compute_loss_func=lambda *a, **k: 0)
    plain_but_fused = make_args(tst_phase_ratio=0, tst_fused_loss="on")
    with pytest.raises(ValueError, match="compute_loss_func"):
        TSTTrainer(llama, plain_but_fused, train_dataset=make_blocks(4), compute_loss_func=lambda *a, **k: 0)
    with pytest.raises(ValueError, match="leave data_collator out"):
        TSTTrainer(llama, make_args(), DataCollatorForTokenSuperposition(3), train_dataset=make_blocks(4))
    stream = datasets.Dataset.from_list(make_blocks(4)).to_iterable_dataset()
    with pytest.raises(ValueError, match=r"dataloader_num_workers=2 needs a stream .* has 1: "):
        TSTTrainer(llama, make_args(dataloader_num_workers=2), train_dataset=stream).train()


@pytest.mark.parametrize("ratio", [0, 0.3])
def test_a_head_that_cannot_be_fused_is_refused_if_fusing_is_a_must(llama, make_args, ratio):
    llama.lm_head.register_forward_hook(lambda *_: None)
    args = make_args(tst_phase_ratio=ratio, tst_fused_loss="on")
    with pytest.raises(ValueError, match="cannot be fused: its head has forward hooks"):
        TSTTrainer(llama, args, train_dataset=make_blocks(200))
    TSTTrainer(llama, make_args(tst_phase_ratio=ratio), train_dataset=make_blocks(200)).train()


def test_a_model_that_is_not_causal_is_refused(make_args):
    from transformers import BertConfig, BertForMaskedLM

    model = BertForMaskedLM(
        BertConfig(vocab_size=50, hidden_size=8, num_hidden_layers=1, num_attention_heads=1)
    )
    with pytest.raises(ValueError, match="causal language model"):
        TSTTrainer(model, make_args(), train_dataset=make_blocks(4))


def test_a_model_with_a_loss_of_its_own_is_refused_unless_training_is_plain(make_args):
    from transformers import TrOCRConfig, TrOCRForCausalLM

    sizes = {"d_model": 16, "decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 32}
    model = TrOCRForCausalLM(TrOCRConfig(vocab_size=VOCAB_SIZE, max_position_embeddings=64, **sizes))
    with pytest.raises(ValueError, match="TrOCRForCausalLM computes its loss itself"):
        TSTTrainer(model, make_args(), train_dataset=make_blocks(4))
    TSTTrainer(model, make_args(tst_phase_ratio=0, max_steps=1), train_dataset=make_blocks(4)).train()


def test_a_loss_function_that_was_set_is_refused_unless_training_is_plain(llama, make_args):
    def focal(logits, labels, **_):
        return logits.sum() * 0 + 400

    llama.loss_function = ForCausalLMLoss  # that which it has
    TSTTrainer(llama, make_args(), train_dataset=make_blocks(4))
    with token_superposition(llama, 2):
        copied = copy.deepcopy(llama)
    with pytest.raises(TSTError, match="made or copied inside"):
        TSTTrainer(copied, make_args(), train_dataset=make_blocks(4))
    llama.loss_function = focal
    with pytest.raises(TSTError, match="focal"):
        TSTTrainer(llama, make_args(), train_dataset=make_blocks(4))
    trainer = TSTTrainer(llama, make_args(tst_phase_ratio=0, max_steps=1), train_dataset=make_blocks(4))
    assert trainer.train().training_loss == 400


class OwnConfig(PretrainedConfig):
    model_type = "own"

    def __init__(self, kind="none", **options):
        self.kind, self.vocab_size, self.hidden_size = kind, VOCAB_SIZE, 16
        super().__init__(**options)


class OwnModelForCausalLM(PreTrainedModel):
    """A model that reads ids beside its embedding, as models with value embeddings or hashed neighbors do."""

    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.embed, self.more = nn.Embedding(VOCAB_SIZE, 16), nn.Embedding(128, 16)
        self.body, self.head = nn.GRU(16, 16, batch_first=True), nn.Linear(16, VOCAB_SIZE, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.embed

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids=None, labels=None, **options):
        hidden = self.embed(input_ids)
        if self.config.kind == "value embedding":
            hidden = hidden + self.more(input_ids)
        if self.config.kind == "table without a mix of positions":
            logits = self.head(hidden + self.more(input_ids))
            return CausalLMOutputWithPast(
                loss=None if labels is None else self.loss_function(logits, labels, VOCAB_SIZE), logits=logits
            )
        if self.config.kind == "row of a table":
            hidden = hidden + self.more.weight[input_ids.long()]
        if self.config.kind == "hash of neighbors":
            hidden = hidden + self.more(
                (nn.functional.pad(input_ids[:, :-1], (1, 0)) * 31 + input_ids).long() % 128
            )
        if self.config.kind == "mask of positive ids":
            hidden = hidden * (input_ids > 0)[..., None]
        if self.config.kind == "noise":
            hidden = hidden + 0.02 * torch.randn_like(hidden)
        logits = self.head(self.body(hidden)[0])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=VOCAB_SIZE, **options)
        if self.config.kind == "gives a tuple":
            return (logits,) if loss is None else (loss, logits)
        if self.config.kind == "gives a dictionary":
            return {"logits": logits} if loss is None else {"loss": loss, "logits": logits}
        return CausalLMOutputWithPast(loss=loss, logits=logits)


@pytest.mark.parametrize("kind", ["gives a tuple", "gives a dictionary", "noise"])
def test_other_forms_of_outputs_and_noise_are_no_reason_to_refuse_a_model(make_args, kind):
    model = OwnModelForCausalLM(OwnConfig(kind))
    with torch.no_grad():
        model.head.weight.mul_(0.1)
    TSTTrainer(model, make_args(max_steps=4, tst_fused_loss="off"), train_dataset=make_blocks(80)).train()


@pytest.mark.parametrize("mode", ["full", "output"])
@pytest.mark.parametrize(
    "kind",
    [
        "none",
        "value embedding",
        "table without a mix of positions",
        "row of a table",
        "hash of neighbors",
        "mask of positive ids",
    ],
)
def test_a_model_that_reads_ids_beside_its_embedding_is_refused(make_args, kind, mode):
    trainer = TSTTrainer(
        OwnModelForCausalLM(OwnConfig(kind)),
        make_args(tst_mode=mode, max_steps=4),
        train_dataset=make_blocks(80),
    )
    if kind == "none" or mode == "output":  # which reads single tokens
        trainer.train()
        return
    with pytest.raises(TSTError, match="OwnModelForCausalLM also reads token ids outside"):
        trainer.train()
    assert trainer.state.global_step == 0
    assert trainer.model.training


def test_a_user_s_subclass_of_a_causal_model_is_one_whatever_its_name(llama, make_args):
    class Mine(type(llama)):
        pass

    TSTTrainer(Mine(llama.config), make_args(max_steps=2), train_dataset=make_blocks(40)).train()


def test_periodic_text_is_not_taken_for_copied_labels(llama, make_args):
    blocks = [{"input_ids": [5, 6, 7, 8] * (BLOCK_LENGTH // 4)} for _ in range(100)]
    TSTTrainer(llama, make_args(tst_bag_size=4, max_steps=4), train_dataset=blocks).train()


@pytest.mark.parametrize("how", ["pops its labels", "in two parts"])
def test_own_losses_that_pass_the_labels_of_the_batch_train(llama, make_args, how):
    class Own(TSTTrainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            if how == "in two parts":
                halves = [{name: part[i::2] for name, part in inputs.items()} for i in range(2)]
                return sum(super(Own, self).training_step(model, half, num_items_in_batch) for half in halves)
            labels = inputs.pop("labels")
            loss = model(**inputs, labels=labels, num_items_in_batch=num_items_in_batch).loss
            self.accelerator.backward(loss)
            return loss.detach()

    args = make_args(max_steps=4, per_device_train_batch_size=2)
    Own(llama, args, train_dataset=make_blocks(100)).train()


def test_documents_are_respected_by_a_model_of_model_init(llama, make_args):
    """Trainer does not switch the cache of such a model off, with which attention would cross documents."""
    llama.config.eos_token_id = 5
    runs = []
    for use_cache in (True, False):
        llama.config.use_cache = use_cache
        args = make_args(max_steps=8, tst_document_boundaries="respect")
        trainer = TSTTrainer(
            None, args, model_init=lambda: copy.deepcopy(llama), train_dataset=make_blocks(200)
        )
        trainer.train()
        runs.append(losses(trainer))
    assert runs[0] == runs[1]


def test_positions_of_several_axes_are_left_out_of_bags(llama, make_args):
    def collate(rows):
        ids = torch.tensor([row["input_ids"] for row in rows])
        return {"input_ids": ids, "labels": ids, "position_ids": torch.zeros(3, *ids.shape, dtype=torch.long)}

    args = make_args(max_steps=4, tst_phase_ratio=1.0, remove_unused_columns=False)
    TSTTrainer(llama, args, collate, train_dataset=make_blocks(100)).train()


@pytest.mark.parametrize("method", ["compute_loss", "in place", "_prepare_inputs"])
@pytest.mark.parametrize("ratio", [0, 0.5])
def test_labels_that_a_subclass_masks_by_the_ids_beside_them_are_refused_in_superposition(
    llama, make_args, method, ratio
):
    def masked(inputs):
        return {**inputs, "labels": inputs["labels"].masked_fill(inputs["input_ids"] == 5, -100)}

    class MasksInLoss(TSTTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            return super().compute_loss(model, masked(inputs), *args, **kwargs)

    class MasksBefore(TSTTrainer):
        def _prepare_inputs(self, inputs):
            return super()._prepare_inputs(masked(inputs))

    class MasksInPlace(TSTTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            inputs["labels"][inputs["input_ids"] == 5] = -100
            return super().compute_loss(model, inputs, *args, **kwargs)

    trainer_class = {"compute_loss": MasksInLoss, "in place": MasksInPlace}.get(method, MasksBefore)
    blocks = [{"input_ids": [5, 6, 7, 5] * (BLOCK_LENGTH // 4)} for _ in range(100)]
    trainer = trainer_class(llama, make_args(tst_phase_ratio=ratio, max_steps=4), train_dataset=blocks)
    if not ratio:
        trainer.train()
        return
    with pytest.raises(TSTError, match="mask labels in the data or in data_collator"):
        trainer.train()


@pytest.mark.parametrize("step", [1, 6])
def test_a_change_of_gradient_accumulation_in_training_is_refused(llama, make_args, step):
    class Ramp(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == step:
                args.gradient_accumulation_steps = 2

    trainer = TSTTrainer(
        llama,
        make_args(max_steps=10, tst_phase_ratio=0.4),
        train_dataset=make_blocks(400),
        callbacks=[Ramp()],
    )
    with pytest.raises(TSTError, match=r"gradient_accumulation_steps was 1 .* is 2 now"):
        trainer.train()


@pytest.mark.parametrize("part", ["train_dataset", "eval_dataset"])
@pytest.mark.parametrize("ratio", [0, 0.3])
def test_rows_that_a_collator_changes_are_checked_as_it_makes_them(llama, make_args, part, ratio):
    def lowered(rows):
        ids = torch.tensor([row["input_ids"] for row in rows]) - 1000
        return {"input_ids": ids, "labels": ids}

    high = [{"input_ids": [1000 + token for token in block["input_ids"]]} for block in make_blocks(100)]
    trainer = TSTTrainer(
        llama,
        make_args(tst_phase_ratio=ratio, max_steps=4),
        lowered,
        train_dataset=high,
        eval_dataset=high[:4],
    )
    trainer.train() if part == "train_dataset" else trainer.evaluate()


def test_several_data_sets_in_place_of_one_are_refused(llama, make_args):
    data = datasets.DatasetDict(train=datasets.Dataset.from_list(make_blocks(100)))
    with pytest.raises(TSTError, match=r"choose one, such as data\['train'\]"):
        TSTTrainer(llama, make_args(), train_dataset=data).train()


@pytest.mark.parametrize("patched", ["class", "instance"])
def test_a_fused_loss_that_was_patched_in_for_training_is_refused(llama, make_args, patched):
    """As Liger does: in training mode its forward takes the loss from hidden states and labels, and makes no logits."""
    original = type(llama).forward

    def forward(self, input_ids=None, labels=None, **kwargs):
        if not self.training or labels is None:
            return original(self, input_ids=input_ids, labels=labels, **kwargs)
        hidden = self.model(input_ids=input_ids).last_hidden_state[:, :-1]
        logits = hidden @ self.lm_head.weight.T
        return CausalLMOutputWithPast(loss=cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten()))

    if patched == "class":
        llama.__class__ = type("LlamaForCausalLM", (type(llama),), {"forward": forward})
    else:
        llama.forward = MethodType(forward, llama)
    llama.model.train()
    modes = [module.training for module in llama.modules()]
    with pytest.raises(ValueError, match=r"computes its loss itself.*fused_linear_cross_entropy=False"):
        TSTTrainer(llama, make_args(), train_dataset=make_blocks(4))
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match="computes its loss itself"), token_superposition(llama, 4):
        pass
    assert [module.training for module in llama.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    with fused_next_token_loss(llama.train()):
        outputs = llama(input_ids=torch.arange(8)[None], labels=torch.arange(8)[None])
    assert outputs.logits is None
    assert outputs.loss.item() == pytest.approx(math.log(VOCAB_SIZE), rel=0.02)


@pytest.mark.parametrize("ratio", [0.3, 0])
def test_a_model_of_unsloth_is_refused(llama, make_args, ratio):
    """It replaces the forward of the model's class; short batches have logits and a loss of its own, long ones no logits at all."""

    def fast_forward(self, input_ids=None, attention_mask=None, labels=None, *args, **kwargs):
        self.model._has_no_labels = labels is None
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask)[0]
        rows, length, _ = hidden.shape
        count = kwargs.get("num_items_in_batch") or kwargs.get("n_items")
        logits, loss = self.lm_head(hidden.to(self.lm_head.weight.dtype)), None
        if labels is not None:
            targets = torch.full_like(labels, -100)
            targets[..., :-1] = labels[..., 1:]
            assert labels.shape == (rows, length)
            total = cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
            loss = total / ((targets != -100).sum() if count is None else count)
        return CausalLMOutputWithPast(loss=loss, logits=logits if rows * length <= 1024 else torch.empty(0))

    llama.__class__ = type("LlamaForCausalLM", (type(llama),), {"forward": fast_forward})
    args = make_args(tst_phase_ratio=ratio, tst_fused_loss="auto" if ratio else "on")
    with pytest.raises(
        TSTError, match=r"Unsloth must be loaded with Transformers|does not call loss_function"
    ):
        TSTTrainer(llama, args, train_dataset=make_blocks(4))


def test_arguments_that_cannot_be_saved_are_refused_before_the_first_step(llama, make_args):
    class LocalArguments(type(make_args())):
        """A class inside a function cannot be pickled."""

    args = make_args()
    args.__class__ = LocalArguments
    trainer = TSTTrainer(llama, args, train_dataset=make_blocks(100))
    with pytest.raises(TSTError, match=r"training arguments cannot be saved.*LocalArguments"):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_comes_back_when_the_forward_pass_fails(llama, training):
    original, modes = llama.forward, []

    def forward(self, *args, **kwargs):
        modes.append(self.training)
        assert not self.training
        return original(*args, **kwargs)

    llama.train(training).forward = MethodType(forward, llama)
    computes_own_loss(llama)
    assert modes == [False, True, True]  # in training again, with the body itself
    assert {module.training for module in llama.modules()} == {training}


# Ids without an embedding, and rows without a position

BAD_ID = [{"input_ids": [1] * (BLOCK_LENGTH - 1) + [VOCAB_SIZE + 3]}]
STORED = {
    "list": lambda blocks: blocks,
    "dataset": datasets.Dataset.from_list,
    "stream": lambda blocks: datasets.Dataset.from_list(blocks).to_iterable_dataset(),
}


@pytest.mark.parametrize("kind", STORED)
@pytest.mark.parametrize("part", ["train_dataset", "eval_dataset"])
@pytest.mark.parametrize("ratio", [0, 0.3])
def test_an_id_without_an_embedding_is_refused_with_its_block(llama, make_args, kind, part, ratio):
    """The block is none of those that are looked at first; where rows are numbered it is named by its number."""
    blocks = [{"input_ids": block["input_ids"]} for block in make_blocks(400)]
    bad = 301 if part == "train_dataset" else 3
    data = {"train_dataset": blocks, "eval_dataset": blocks[:4]}
    data[part] = STORED[kind](data[part][:bad] + BAD_ID + data[part][bad + 1 :])
    args = make_args(
        tst_phase_ratio=ratio, max_steps=-1 if kind != "stream" or part == "eval_dataset" else 210, num_train_epochs=1,
        eval_strategy="epoch" if part == "eval_dataset" else "no", per_device_train_batch_size=1,
    )  # fmt: skip
    if kind == "stream" and part == "train_dataset" and ratio == 0:
        args.max_steps = 400
    trainer = TSTTrainer(llama, args, **data)
    with pytest.raises(
        TSTError, match=f"holds the id {VOCAB_SIZE + 3}, but .*resize_token_embeddings"
    ) as caught:
        trainer.train()
    name = f"Block {bad} of the" if (part, ratio) != ("train_dataset", 0) and kind != "stream" else "Block "
    assert str(caught.value).startswith(name)
    assert part == "train_dataset" or kind == "stream" or trainer.state.global_step == 0


def spoil(rows):
    """The batch of a collator of one's own, with an id that has no embedding in place of 0."""
    ids = torch.tensor([row["input_ids"] for row in rows])
    return {"input_ids": ids.where(ids != 0, VOCAB_SIZE + 3), "labels": ids}


@pytest.mark.parametrize("bag_size", [2, 4])
def test_a_loader_or_collator_that_makes_bags_itself_is_refused(llama, make_args, bag_size):
    """Folded once more, their targets would be those of another bag."""
    bags = DataCollatorForTokenSuperposition(bag_size)

    class OwnLoader(TSTTrainer):
        def get_train_dataloader(self):
            return DataLoader(self.train_dataset, batch_size=2, collate_fn=bags)

    trainers = [
        OwnLoader(llama, make_args(), train_dataset=make_blocks(400)),
        TSTTrainer(llama, make_args(), lambda rows: bags(rows), train_dataset=make_blocks(400)),
    ]
    for trainer in trainers:
        with pytest.raises(TSTError, match=f"shape .*, {bag_size}\\)"):
            trainer.train()
        assert trainer.state.global_step == 0


class OwnLoaders(TSTTrainer):
    """Loaders that are not Trainer's."""

    def get_train_dataloader(self):
        return DataLoader(self.train_dataset, batch_size=2, collate_fn=spoil)

    def get_eval_dataloader(self, eval_dataset=None):
        return DataLoader(self.eval_dataset, batch_size=2, collate_fn=spoil)


@pytest.mark.parametrize("ratio", [0, 0.3])
@pytest.mark.parametrize("part", ["training", "evaluation"])
@pytest.mark.parametrize("own", ["collator", "collator in a process", "loader"])
def test_an_id_without_an_embedding_of_one_s_own_batches_is_one_sentence(llama, make_args, own, part, ratio):
    bad = [{"input_ids": [1 + token % 90 for token in block["input_ids"]]} for block in make_blocks(60)]
    bad[40] = {"input_ids": [0] * BLOCK_LENGTH}
    args = make_args(
        tst_phase_ratio=ratio, tst_bag_size=2, num_train_epochs=1, max_steps=-1, per_device_train_batch_size=2,
        dataloader_num_workers=int("process" in own), remove_unused_columns=False,
    )  # fmt: skip
    data = {"train_dataset": bad, "eval_dataset": bad}
    own_collator = () if own == "loader" else (spoil,)
    trainer = (OwnLoaders if own == "loader" else TSTTrainer)(llama, args, *own_collator, **data)
    act = trainer.train if part == "training" else trainer.evaluate
    with pytest.raises(
        TSTError, match=f"holds the id {VOCAB_SIZE + 3}, but .*resize_token_embeddings"
    ) as caught:
        act()
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("ratio", [0, 0.3])
@pytest.mark.parametrize("part", ["train_dataset", "eval_dataset"])
def test_rows_longer_than_a_table_of_positions_are_refused(make_args, ratio, part):
    data = {"train_dataset": make_blocks(200), "eval_dataset": make_blocks(4)} | {
        part: make_blocks(200, length=65)
    }
    trainer = TSTTrainer(make_model("gpt2"), make_args(tst_phase_ratio=ratio), **data)
    with pytest.raises(TSTError, match="has 65 tokens, more than the model's context of 64"):
        trainer.train()
    assert trainer.state.global_step == 0
    # Rotary positions have no table.
    TSTTrainer(make_model("llama"), make_args(tst_phase_ratio=ratio, max_steps=2), **data).train()


def test_mpt_says_its_context_under_another_name(tmp_path):
    from hf_tst.pretraining.options import DataArguments, choose_block_size

    config = CONFIG_MAPPING["mpt"](d_model=16, n_layers=2, n_heads=2, max_seq_len=64)
    assert choose_block_size(DataArguments(train_file="x"), config) == 64
    with pytest.raises(TSTError, match="block_size=65 is more than the model's context of 64 tokens"):
        choose_block_size(DataArguments(train_file="x", block_size=65), config)


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(llama):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    def make(count, **special):
        vocabulary = {f"t{i}": i for i in range(count)}
        return PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="t0")), **special
        )

    check_tokenizer(make(VOCAB_SIZE), llama)
    check_tokenizer(make(VOCAB_SIZE, pad_token="<pad>"), llama)  # packed text has no padding
    with pytest.raises(
        TSTError, match=rf"ids up to {VOCAB_SIZE}, .*resize_token_embeddings\({VOCAB_SIZE + 1}\)"
    ):
        check_tokenizer(make(VOCAB_SIZE + 1), llama)
