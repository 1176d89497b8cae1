import datasets
import numpy as np
import pytest

from hf_tst.packing import BlockStream, cut_blocks, pack_blocks, tokenize_documents
from hf_tst.quickstart import standard_library_documents, standard_library_files, train_tokenizer
from hf_tst.text_files import load_text_file

TEXTS = ["def f(x):\n    return x\n", "", "import os\n" * 40, "é ü 漢字 \n"]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, vocab_size=300)


def test_the_tokenizer_gives_every_text_back(tokenizer):
    for text in [*TEXTS, "🤖 never seen"]:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer) <= 300


@pytest.mark.parametrize("block_size", [2, 7])
def test_packing_keeps_every_token_in_order_but_the_last_remainder(tokenizer, block_size):
    documents = datasets.Dataset.from_dict({"text": TEXTS * 3})
    expected = [t for text in TEXTS * 3 for t in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    tokenized = tokenize_documents(documents, tokenizer)
    blocks = pack_blocks(tokenized, block_size)
    whole = len(expected) // block_size * block_size
    assert np.array(blocks["input_ids"]).ravel().tolist() == expected[:whole]
    streamed = list(BlockStream(tokenized, block_size))
    assert np.array([block["input_ids"] for block in streamed]).ravel().tolist() == expected[:whole]


def test_cutting_does_not_depend_on_where_documents_end():
    tokens = np.arange(23, dtype=np.int32)
    for pieces in ([tokens], np.split(tokens, [1, 1, 9, 20]), [tokens[i : i + 1] for i in range(23)]):
        *blocks, rest = cut_blocks(pieces, 5)
        assert np.concatenate(blocks).ravel().tolist() == list(range(20))
        assert rest.tolist() == [20, 21, 22]


def test_tokenised_data_is_left_alone(tokenizer):
    documents = datasets.Dataset.from_dict({"input_ids": [[1, 2]]})
    assert tokenize_documents(documents, tokenizer) is documents


def test_bad_data_says_what_to_do(tokenizer, tmp_path):
    documents = datasets.Dataset.from_dict({"content": ["a b"], "other": ["c"]})
    with pytest.raises(ValueError, match="set text_column"):
        tokenize_documents(documents, tokenizer, text_column="text")
    with pytest.raises(ValueError, match="do not fill one block of 50"):
        pack_blocks(tokenize_documents(documents, tokenizer), 50)
    (tmp_path / "empty.txt").touch()
    with pytest.raises(ValueError, match="is empty"):
        load_text_file(str(tmp_path / "empty.txt"))
    with pytest.raises(ValueError, match="There is no file"):
        load_text_file(str(tmp_path / "missing.jsonl"))
    with pytest.raises(ValueError, match="must end in one of"):
        load_text_file(str(tmp_path / "text.pdf"))


def test_a_text_file_joins_to_its_text_again(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo\nthree", encoding="utf-8")
    rows = load_text_file(str(tmp_path / "a.txt"))
    assert "".join(rows["text"]) == "one\n\ntwo\nthree"
    assert (
        "".join(row["text"] for row in load_text_file(str(tmp_path / "a.txt"), streaming=True))
        == "one\n\ntwo\nthree"
    )


def test_the_standard_library_is_real_text():
    assert any(path.name == "dataclasses.py" for path in standard_library_files())
    assert not any("site-packages" in path.parts for path in standard_library_files())
    documents = standard_library_documents(max_bytes=200_000)
    assert 200_000 <= sum(len(text.encode()) for text in documents["text"]) < 2_000_000
    assert documents["text"][:] == standard_library_documents(max_bytes=200_000)["text"][:]
