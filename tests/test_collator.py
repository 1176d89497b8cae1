import dataclasses

import numpy as np
import pytest
import torch

from hf_tst import DataCollatorForTokenSuperposition


def test_rows_become_bags_with_the_next_bag_as_target():
    batch = DataCollatorForTokenSuperposition(bag_size=2)(
        [{"input_ids": [1, 2, 3, 4]}, {"input_ids": [5, 6, 7, 8]}]
    )
    assert batch["input_ids"].tolist() == [[[1, 2], [3, 4]], [[5, 6], [7, 8]]]
    assert batch["labels"].tolist() == [[[3, 4], [-100, -100]], [[7, 8], [-100, -100]]]
    assert batch["labels"].dtype == torch.long


def test_labels_of_the_data_are_folded_like_the_ids():
    row = {"input_ids": [1, 2, 3, 4], "labels": [1, 2, -100, 4]}
    assert DataCollatorForTokenSuperposition(bag_size=2)([row])["labels"][0, 0].tolist() == [-100, 4]


def test_output_mode_keeps_the_input():
    batch = DataCollatorForTokenSuperposition(bag_size=2, mode="output")([{"input_ids": [1, 2, 3]}])
    assert batch["input_ids"].tolist() == [[1, 2, 3]]
    assert batch["labels"].tolist() == [[[2, 3], [3, -100], [-100, -100]]]


def test_more_rows_are_the_blocks_of_a_row_each_folded_by_itself():
    row = {"input_ids": list(range(8)), "position_ids": [0, 1, 2, 3, 0, 1, 0, 1]}
    collator = DataCollatorForTokenSuperposition(bag_size=2, superposition_rows="more")
    batch = collator([row])
    assert batch["input_ids"].tolist() == [[[0, 1], [2, 3]], [[4, 5], [6, 7]]]
    assert batch["labels"].tolist() == [[[2, 3], [-100, -100]], [[6, 7], [-100, -100]]]
    respecting = dataclasses.replace(collator, document_boundaries="respect")([row])
    assert respecting["position_ids"].tolist() == [[0, 1], [0, 0]]
    assert respecting["labels"].tolist() == [[[2, 3], [-100, -100]], [[-100, -100], [-100, -100]]]
    with pytest.raises(ValueError, match="no multiple of the bag size"):
        collator([{"input_ids": list(range(6))}])


def test_bags_of_one_are_an_ordinary_batch():
    row = {"input_ids": np.array([1, 2, 3], dtype=np.int32), "attention_mask": [1, 1, 1]}
    batch = DataCollatorForTokenSuperposition(bag_size=1)([row])
    assert batch["input_ids"].tolist() == batch["labels"].tolist() == [[1, 2, 3]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1]]
    assert batch["labels"].dtype == torch.long


def test_an_all_ones_mask_is_dropped():
    batch = DataCollatorForTokenSuperposition(bag_size=2)(
        [{"input_ids": [1, 2, 3, 4], "attention_mask": [1] * 4}]
    )
    assert set(batch) == {"input_ids", "labels"}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"input_ids": [1, 2, 3, 4], "attention_mask": [1, 1, 1, 0]}], "padded"),
        ([{"input_ids": [1, 2], "attention_mask": mask} for mask in ([1, 1], [1, 0])], "padded"),
        ([{"input_ids": [1, 2, 3, 4]}, {"input_ids": [1, 2]}], "equal length"),
        ([{"input_ids": [1, 2, 3]}], "multiple of the bag size"),
        ([{"text": "abc"}], "input_ids"),
    ],
)
def test_rows_that_are_no_full_bags_are_refused(rows, message):
    with pytest.raises(ValueError, match=message):
        DataCollatorForTokenSuperposition(bag_size=2)(rows)


def test_padding_is_no_target_where_labels_are_made_from_tokens():
    rows = [
        {"input_ids": [5, 6, 7, 0], "attention_mask": [1, 1, 1, 0]},
        {"input_ids": [1, 2, 3, 4], "attention_mask": [1] * 4},
    ]
    batch = DataCollatorForTokenSuperposition(bag_size=1)(rows)
    assert batch["labels"].tolist() == [[5, 6, 7, -100], [1, 2, 3, 4]]


@pytest.mark.parametrize("make", [list, tuple, np.array, torch.tensor, lambda row: {"input_ids": row}])
def test_rows_may_be_their_ids_alone(make):
    rows = [make([1, 2, 3, 4]), make([5, 6, 7, 8])]
    batch = DataCollatorForTokenSuperposition(bag_size=2)(rows)
    assert batch["input_ids"].tolist() == [[[1, 2], [3, 4]], [[5, 6], [7, 8]]]
    assert batch["labels"][:, 0].tolist() == [[3, 4], [7, 8]]
    plain = DataCollatorForTokenSuperposition(bag_size=1)(rows)
    assert plain["labels"].tolist() == [[1, 2, 3, 4], [5, 6, 7, 8]]
