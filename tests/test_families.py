"""Every family of `tiny_families.py`: input, loss, gradients, causality, undo and checkpoint; and the table of them."""

import filecmp

import families as table
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tables import read_table
from tiny_families import FAMILIES, VOCAB_SIZE, make_family

from hf_tst import fused_next_token_loss, token_superposition
from hf_tst.bags.folding import fold_into_bags, next_bag_labels
from hf_tst.models.head import UnfusableHeadError, inspect_head
from hf_tst.models.probes import check_ids_reach_the_embedding_alone

TOKENS = torch.randint(1, VOCAB_SIZE, (2, 24), generator=torch.Generator().manual_seed(3))
BAGS = fold_into_bags(TOKENS, 4)
LABELS = next_bag_labels(BAGS)
SERVED = [family for family in FAMILIES if not family.refused]
REFUSED = [family for family in FAMILIES if family.refused]


def by_name(families):
    return pytest.mark.parametrize("family", families, ids=lambda family: family.name.replace(" ", "-"))


def oracle_loss(logits, labels, *args, **kwargs):
    """The paper's loss: the mean over the offsets of ordinary cross entropies."""
    losses = [
        F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten()) for targets in labels.unbind(-1)
    ]
    return sum(losses) / len(losses)


def mean_embeddings(model, family):
    embedded = model.get_input_embeddings()(BAGS.flatten(1)).unflatten(1, BAGS.shape[1:])
    return embedded.mean(2) * family.embeds_scale


def step(model, **inputs):
    model.zero_grad()
    outputs = model(**inputs)
    outputs.loss.backward()
    return outputs, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(found, expected):
    assert set(found) == set(expected)
    for name, gradient in expected.items():
        size = max(1.0, gradient.abs().max().item())
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6 * size, msg=name)


def anatomy(model):
    """Everything of a model that a hook could leave something in."""
    modules = {
        name: (type(module), set(vars(module)), len(module._forward_hooks), len(module._forward_pre_hooks))
        for name, module in model.named_modules()
    }
    return modules, list(model.state_dict()), model.config.to_dict()


def fusion(model):
    try:
        inspect_head(model)
    except UnfusableHeadError:
        return "auto"
    return "on"


@by_name(SERVED)
def test_input_is_the_mean_of_the_embeddings_as_the_first_layer_sees_them(family):
    model = make_family(family).eval()
    with torch.no_grad():
        mean = mean_embeddings(model, family)
        expected = model(inputs_embeds=mean).logits
        constant = BAGS[..., :1].expand_as(BAGS)
        single = model(input_ids=BAGS[..., 0]).logits
        with table.watch_first_block(model) as tokens:
            for offset in range(4):
                model(input_ids=BAGS[..., offset].contiguous())
        with token_superposition(model, 4):
            torch.testing.assert_close(model(input_ids=BAGS).logits, expected)
            # Bags of equal tokens are those tokens: scaling and positions happen once, as in an ordinary pass.
            torch.testing.assert_close(model(input_ids=constant).logits, single, rtol=1e-4, atol=1e-5)
            with table.watch_first_block(model) as bags:
                model(input_ids=BAGS)
    if table.measure_embedding(model)[1] is not None:  # linear up to the first layer
        torch.testing.assert_close(bags[0], torch.stack(tokens).mean(0), rtol=1e-4, atol=1e-5)


@by_name(SERVED)
def test_loss_and_gradients_are_those_of_its_own_logits(family):
    model, oracle = make_family(family).train(), make_family(family).train()
    mean = mean_embeddings(oracle, family)
    oracle.loss_function = oracle_loss  # whatever else the family adds to its loss, it adds here
    expected, gradients = step(oracle, inputs_embeds=mean, labels=LABELS)
    for choice in ("off", fusion(model)):
        with token_superposition(model, 4, fused_loss=choice):
            outputs, found = step(model, input_ids=BAGS, labels=LABELS)
        torch.testing.assert_close(outputs.loss, expected.loss, rtol=1e-5, atol=1e-6)
        assert_same_gradients(found, gradients)
        cache = {"past_key_values", "cache"}  # the name of newer versions
        assert set(outputs) - cache == set(expected) - cache
    assert outputs.logits.shape[-1] == (0 if fusion(model) == "on" else VOCAB_SIZE)
    plain, gradients = step(model, input_ids=TOKENS, labels=TOKENS)
    with fused_next_token_loss(model, fusion(model)):
        outputs, found = step(model, input_ids=TOKENS, labels=TOKENS)
    torch.testing.assert_close(outputs.loss, plain.loss, rtol=1e-5, atol=1e-6)
    assert_same_gradients(found, gradients)


@by_name(SERVED)
def test_its_ids_reach_the_embedding_alone(family, caplog):
    check_ids_reach_the_embedding_alone(make_family(family))
    assert "Cannot check" not in caplog.text


@by_name(SERVED)
def test_no_position_sees_a_later_bag(family):
    model = make_family(family).eval()
    changed = BAGS.clone()
    changed[:, 3, 1] = changed[:, 3, 1] % (VOCAB_SIZE - 1) + 1
    with token_superposition(model, 4), torch.no_grad():
        before, after = model(input_ids=BAGS).logits, model(input_ids=changed).logits
    torch.testing.assert_close(before[:, :3], after[:, :3], rtol=0, atol=1e-6)
    assert (before[:, 3] - after[:, 3]).abs().max() > 1e-4


@by_name(SERVED)
def test_nothing_remains_and_the_checkpoint_is_its_own(family, tmp_path):
    model = make_family(family).eval()
    with torch.no_grad():
        logits = model(input_ids=TOKENS).logits
    model.save_pretrained(tmp_path / "before")
    before = anatomy(model)
    with token_superposition(model, 4):
        model.save_pretrained(tmp_path / "inside")
    assert anatomy(model) == before
    with torch.no_grad():
        assert torch.equal(model(input_ids=TOKENS).logits, logits)
    assert filecmp.cmp(tmp_path / "before/config.json", tmp_path / "inside/config.json", shallow=False)
    saved, expected = (load_file(tmp_path / folder / "model.safetensors") for folder in ("inside", "before"))
    assert set(saved) == set(expected)
    assert all(torch.equal(saved[name], expected[name]) for name in saved)


@by_name(REFUSED)
def test_a_family_that_cannot_work_says_why(family):
    model = make_family(family)
    with pytest.raises(ValueError, match=family.refused), token_superposition(model, 4):
        pass


# The table


def read_rows(name="families"):
    lines = read_table("docs/families.md", name).splitlines()
    return [tuple(cell.strip() for cell in line.strip("|").split("|")) for line in lines]


@by_name(FAMILIES)
def test_the_table_says_what_the_family_does(family):
    assert table.describe(family) in read_rows(), "run `python scripts/families.py`"


def test_the_table_lists_these_families_and_no_others():
    header, _, *rows = read_rows()
    assert header == table.COLUMNS
    assert [row[0] for row in rows] == [family.name for family in FAMILIES]
    assert len(SERVED) >= 24


def test_the_short_table_has_the_names_of_all():
    _, _, *rows = read_rows()
    kinds = dict(read_rows("summary")[2:])
    names = [name for names in kinds.values() for name in names.split(", ")]
    assert sorted(names) == sorted(row[0] for row in rows)
    assert kinds["refused, with the reason"].split(", ") == [family.name for family in REFUSED]
