"""Token ids in a .npy file as training and validation data, and the script that makes such files."""

import lzma
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from hf_tst import TSTError
from hf_tst.data.files import load_text_file
from hf_tst.data.token_file import TokenFile
from hf_tst.pretraining import parts, pretrain
from hf_tst.pretraining.documents import load_documents, prepare_blocks
from hf_tst.pretraining.options import DataArguments, ModelArguments

ROOT = Path(__file__).parent.parent


def write_ids(path, count, dtype="uint16", top=64):
    ids = np.random.default_rng(0).integers(1, top, count).astype(dtype)
    ids[::50] = 0
    np.save(path, ids)
    return ids


def rows(blocks):
    return np.stack([blocks[i]["input_ids"] for i in range(len(blocks))])


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_blocks_are_the_file_in_its_order(tmp_path, dtype):
    ids = write_ids(tmp_path / "a.npy", 1003, dtype)
    blocks = TokenFile(str(tmp_path / "a.npy")).cut(10)
    assert (rows(blocks) == ids[:1000].reshape(100, 10)).all()
    assert np.shares_memory(blocks[3]["input_ids"], blocks.ids)
    some = blocks.select([99, 4])
    assert (rows(some) == ids[:1000].reshape(100, 10)[[99, 4]]).all()
    sent = pickle.dumps(some)
    assert len(sent) < 500  # not the file
    assert (rows(pickle.loads(sent)) == rows(some)).all()


def test_the_first_share_is_held_out(tmp_path):
    path = str(tmp_path / "a.npy")
    ids = write_ids(path, 1003)
    args = DataArguments(train_file=path, validation_split_percentage=10, max_eval_samples=4)
    train, held_out = load_documents(args, ModelArguments())
    assert (rows(prepare_blocks(args, train, None, 8)) == ids[100 : 100 + 8 * 112].reshape(112, 8)).all()
    found = rows(prepare_blocks(args, held_out, None, 8, evaluation=True))
    assert (found == ids[:96].reshape(12, 8)[[0, 3, 6, 9]]).all()


def test_the_first_blocks_of_many_are_not_listed_one_by_one(tmp_path):
    """A hundred million of them would be gigabytes, in each loader process."""
    ids = write_ids(tmp_path / "a.npy", 8000)
    args = DataArguments(max_train_samples=900)
    blocks = prepare_blocks(args, TokenFile(str(tmp_path / "a.npy")), None, 8)
    assert (rows(blocks) == ids[:7200].reshape(900, 8)).all()
    assert len(pickle.dumps(blocks)) < 500


@pytest.fixture
def packed_recipe(tiny_recipe, tmp_path):
    values = yaml.safe_load(tiny_recipe.read_text())
    del values["tokenizer_name"]
    write_ids(tmp_path / "train.npy", 4000)
    write_ids(tmp_path / "valid.npy", 500)
    values |= {
        "train_file": str(tmp_path / "train.npy"), "validation_file": str(tmp_path / "valid.npy"), "max_steps": 12,
        "tst_phase_ratio": 0.5, "save_steps": 4, "output_dir": str(tmp_path / "run"),
    }  # fmt: skip
    values["config_overrides"]["vocab_size"] = 64
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    return tmp_path / "recipe.yaml"


def test_training_on_ids_is_training_on_the_same_ids_in_rows(packed_recipe, tmp_path, monkeypatch):
    """Without a tokenizer. The other way is a data set of the same blocks, packed by `datasets`."""
    import datasets

    trainer = pretrain.main([str(packed_recipe)])
    ids = np.load(tmp_path / "train.npy")
    table = datasets.Dataset.from_dict({"input_ids": ids[:4000].reshape(250, 16).astype(np.int32)})
    whole = parts.prepare_blocks

    def as_rows(args, documents, tokenizer, size, *, evaluation=False):
        blocks = whole(args, documents, tokenizer, size, evaluation=evaluation)
        return blocks if evaluation else table

    monkeypatch.setattr(parts, "prepare_blocks", as_rows)
    other = pretrain.main([str(packed_recipe), "--output_dir", str(tmp_path / "other")])

    def numbers(trainer):
        names = ("loss", "eval_loss", "grad_norm")
        return [[entry.get(name) for name in names] for entry in trainer.state.log_history]

    assert numbers(trainer) == numbers(other)
    assert not (tmp_path / "run" / "tokenizer.json").exists()


def test_a_resume_refuses_other_ids(packed_recipe, tmp_path):
    pretrain.main([str(packed_recipe)])
    last = str(tmp_path / "run" / "checkpoint-8")
    again = pretrain.main([str(packed_recipe), "--resume_from_checkpoint", last])
    assert again.state.global_step == 12
    write_ids(tmp_path / "train.npy", 4000, top=32)
    with pytest.raises(TSTError, match="fingerprint"):
        pretrain.main([str(packed_recipe), "--resume_from_checkpoint", last])


def test_training_needs_no_datasets_package(packed_recipe):
    """As on a machine where it was never installed."""
    program = (
        "import importlib.machinery as m, sys\n"
        "find = m.PathFinder.find_spec\n"
        "m.PathFinder.find_spec = staticmethod(lambda name, *rest: "
        "None if name.split('.')[0] in ('datasets', 'evaluate') else find(name, *rest))\n"
        "from hf_tst.cli.main import main\n"
        f"sys.exit(main(['train', {str(packed_recipe)!r}]))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "final evaluation loss" in done.stdout


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((2, 3), dtype=np.uint16), "shape (2, 3) and type uint16"),
        (np.zeros(900, dtype=np.int64), "of type uint16 or uint32, but holds an array of shape (900,) and type int64"),
        (np.zeros(0, dtype=np.uint16), "array of shape (0,)"),
        (np.full(900, 64, dtype=np.uint16), "holds the id 64, but the model has embeddings for 0 to 63"),
        (np.zeros(15, dtype=np.uint16), "gives 15 tokens, which do not fill one block of 16"),
        (b"no array", "Cannot read"),
        (None, "There is no file"),
    ],
)  # fmt: skip
def test_bad_files_are_one_sentence(packed_recipe, tmp_path, array, message):
    path = tmp_path / "train.npy"
    path.unlink()
    if isinstance(array, bytes):
        path.write_bytes(array)
    elif array is not None:
        np.save(path, array)
    with pytest.raises(TSTError) as error:
        pretrain.main([str(packed_recipe)])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_stream_of_ids_is_refused(packed_recipe):
    with pytest.raises(TSTError, match="leave streaming out"):
        pretrain.main([str(packed_recipe), "--streaming"])


@pytest.mark.parametrize("pattern", ["tok/*.npy", "tok/*"])
def test_several_files_of_ids_are_refused_and_one_is_found_by_a_pattern(tmp_path, pattern):
    (tmp_path / "tok").mkdir()
    ids = write_ids(tmp_path / "tok" / "a.npy", 100)
    assert (load_text_file(str(tmp_path / pattern)).ids == ids).all()
    write_ids(tmp_path / "tok" / "b.npy", 100)
    with pytest.raises(TSTError, match=r"matches 2 files of token ids.*pack_ids\.py") as error:
        load_text_file(str(tmp_path / pattern))
    assert "\n" not in str(error.value)


@pytest.fixture
def pack(tmp_path):
    """Runs `scripts/pack_ids.py` on files of the test's folder, and loads what it writes."""
    import pack_ids

    def call(names, *flags):
        inputs, output = [str(tmp_path / name) for name in names], str(tmp_path / "out.npy")
        pack_ids.main(["--inputs", *inputs, "--output", output, "--overwrite", "True", *flags])
        return np.load(output)

    return call


@pytest.mark.parametrize("eos", [0, 7])
def test_parts_are_packed_and_their_documents_shuffled(tmp_path, pack, eos):
    ids = np.random.default_rng(1).integers(0, 20, 3000).astype("<u2")
    ids[-1] = eos
    (tmp_path / "a.u16.xz").write_bytes(lzma.compress(ids[:1234].tobytes()))
    (tmp_path / "b.bin").write_bytes(ids[1234:2000].tobytes())
    np.save(tmp_path / "c.npy", ids[2000:].astype(np.int64))
    names = ("a.u16.xz", "b.bin", "c.npy")

    def documents(ids):
        found, start = [], 0
        for end, token in enumerate(ids.tolist(), 1):
            if token == eos or end == len(ids):
                found.append(tuple(ids[start:end].tolist()))
                start = end
        return found

    assert (pack(names) == ids).all()
    end = ("--eos_id", str(eos))
    shuffled = pack(names, "--seed", "0", *end)
    assert shuffled.dtype == np.uint16
    assert documents(shuffled) != documents(ids)
    assert (pack(names, "--seed", "0", *end) == shuffled).all()
    assert (pack(names, "--seed", "1", *end) != shuffled).any()
    assert sorted(documents(shuffled)) == sorted(documents(ids))


def test_a_packed_file_is_not_replaced_unasked(tmp_path, pack):
    (tmp_path / "a.bin").write_bytes(bytes(8))
    assert len(pack(["a.bin"])) == 4
    (tmp_path / "a.bin").write_bytes(bytes(16))
    with pytest.raises(
        TSTError, match=r"out\.npy, which would be replaced: name another file, or give --overwrite"
    ):
        pack(["a.bin"], "--overwrite", "False")
    assert len(np.load(tmp_path / "out.npy")) == 4


def test_parts_of_any_whole_numbers_become_one_type(tmp_path, pack):
    np.save(tmp_path / "a.npy", np.array([1, 70_000], dtype=np.int64))
    np.save(tmp_path / "b.npy", np.array([3], dtype=np.uint16))
    packed = pack(["a.npy", "b.npy"], "--dtype", "uint32")
    assert packed.dtype == np.uint32
    assert packed.tolist() == [1, 70_000, 3]
    assert TokenFile(str(tmp_path / "out.npy")).ids.tolist() == [1, 70_000, 3]


@pytest.mark.parametrize(
    ("name", "content", "flags", "message"),
    [
        ("a.bin", b"ab", ["--seed", "0"], "--seed needs --eos_id"),
        ("a.bin", b"abc", [], r"a\.bin"),
        ("a.bin", None, [], r"a\.bin"),
        ("a.u16.xz", b"not packed", [], r"a\.u16\.xz"),
        ("a.bin", np.arange(5, 90, dtype=np.uint32).tobytes(), [], r"a\.bin .*larger type.*--dtype uint32"),
        ("a.bin", np.array([20240520, 1, 5] + [0] * 253, dtype=np.int32).tobytes(), [], r"a\.bin .*header of llm\.c"),
        ("a.npy", b"no array", [], r"a\.npy"),
        ("a.npy", np.array([5, 70_000]), [], r"a\.npy holds the id 70000.*--dtype uint32"),
        ("a.npy", np.array([5, -1]), [], r"a\.npy holds the id -1"),
        ("a.npy", np.zeros((2, 2), dtype=np.uint16), [], r"a\.npy.*shape \(2, 2\)"),
        ("a.npy", np.zeros(2), [], r"a\.npy.*float64"),
    ],
)  # fmt: skip
def test_parts_that_are_no_ids_are_one_sentence(tmp_path, pack, name, content, flags, message):
    if isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    elif content is not None:
        np.save(tmp_path / name, content)
    with pytest.raises(TSTError, match=message) as caught:
        pack([name], *flags)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out.npy").exists()
