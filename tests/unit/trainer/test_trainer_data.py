"""Data: one order for the whole run, and a position that any number of ranks goes on from."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from holdfast.errors import FormatError, HoldfastError, MismatchError, NotFoundError, UsageError
from holdfast.trainer.arguments import read_config
from holdfast.trainer.corpus import ByteTokenizer, Tokens, open_tokenizer, open_tokens
from holdfast.trainer.data import DataLoader

TOKENS = Tokens(np.arange(101, dtype=np.uint16), "fingerprint")
"""20 samples of 5 tokens each."""


def loader(dp_rank: int = 0, dp_size: int = 1, *, seed: int = 0, batch: int = 4) -> DataLoader:
    """One rank's loader of a global batch of `batch`."""
    return DataLoader(
        TOKENS,
        seq_len=5,
        seed=seed,
        batch_per_rank=batch // dp_size,
        dp_rank=dp_rank,
        dp_size=dp_size,
    )


def global_batches(loaders: list[DataLoader], count: int) -> torch.Tensor:
    """The inputs of `count` steps, those of all ranks one after the other."""
    return torch.cat([next(one)[0] for _ in range(count) for one in loaders])


@pytest.mark.parametrize("dp_size", [1, 2, 4])
def test_the_order_of_samples_does_not_depend_on_the_number_of_ranks(dp_size: int) -> None:
    """Method: two epochs and a half, against one rank."""
    ranks = [loader(rank, dp_size) for rank in range(dp_size)]
    assert torch.equal(global_batches(ranks, 12), global_batches([loader()], 12))


def test_an_epoch_has_every_sample_once_and_the_next_another_order() -> None:
    """Method: the first tokens of all samples of two epochs."""
    firsts = global_batches([loader()], 10)[:, 0]
    assert sorted(firsts[:20].tolist()) == list(range(0, 100, 5))
    assert sorted(firsts[20:].tolist()) == list(range(0, 100, 5))
    assert firsts[:20].tolist() != firsts[20:].tolist()


def test_labels_are_the_tokens_that_follow() -> None:
    """Method: tokens that count up."""
    inputs, labels = next(loader())
    assert torch.equal(labels, inputs + 1)


@pytest.mark.parametrize("dp_size", [1, 2])
def test_a_loader_goes_on_where_another_number_of_ranks_left_off(dp_size: int) -> None:
    """Method: seven steps on 4 ranks, their state through JSON, five more on fewer."""
    before = [loader(rank, 4) for rank in range(4)]
    global_batches(before, 7)
    states = [one.state_dict() for one in before]
    assert all(state == states[0] for state in states)
    after = [loader(rank, dp_size) for rank in range(dp_size)]
    for one in after:
        one.load_state_dict(json.loads(json.dumps(states[0])))
    assert torch.equal(global_batches(after, 5), global_batches([loader()], 12)[28:])


def test_the_position_in_other_data_is_refused_with_both_and_the_way_out() -> None:
    """Method: a state of another seed and other tokens; every difference is listed."""
    state = loader(seed=1).state_dict() | {"fingerprint": "other"}
    with pytest.raises(MismatchError) as raised:
        loader().load_state_dict(state)
    assert "`fingerprint` is other in the checkpoint and fingerprint here" in raised.value.what
    assert "`seed` is 1" in raised.value.what
    assert "--checkpoint.exclude_from_loading dataloader" in (raised.value.hint or "")


def test_data_shorter_than_one_sequence_are_refused() -> None:
    """Method: 101 tokens for sequences of 101, which need 102."""
    with pytest.raises(UsageError, match="101 tokens, too few"):
        DataLoader(TOKENS, seq_len=101, seed=0, batch_per_rank=1)


def tokens_of(tmp_path: Path, path: Path | str) -> Tokens:
    """The tokens of a path, cached below `tmp_path`."""
    arguments = ["--job.dump_folder", str(tmp_path / "out"), "--training.dataset_path", str(path)]
    return open_tokens(read_config(arguments), ByteTokenizer())


def test_bytes_stand_between_a_beginning_and_an_end() -> None:
    """Method: a letter of two bytes."""
    assert ByteTokenizer().encode("aé").tolist() == [256, 97, 0xC3, 0xA9, 257]


def test_the_same_text_is_the_same_tokens_from_any_kind_of_file(tmp_path: Path) -> None:
    """Method: two documents as .txt files, as .jsonl and as .parquet; one fingerprint."""
    datasets = pytest.importorskip("datasets")
    texts = ["first", "second\nline"]
    folder = tmp_path / "texts"
    folder.mkdir()
    for number, text in enumerate(texts):
        (folder / f"{number}.txt").write_text(text)
    lines = tmp_path / "texts.jsonl"
    lines.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    table = tmp_path / "texts.parquet"
    datasets.Dataset.from_dict({"text": texts}).to_parquet(str(table))
    opened = [tokens_of(tmp_path, path) for path in (folder, lines, table)]
    assert len({one.fingerprint for one in opened}) == 1
    assert bytes(opened[0].ids[1:6].tolist()) == b"first"
    assert len(opened[0].ids) == 5 + 11 + 4


def test_tokens_are_made_once_and_anew_when_the_text_or_the_cache_changes(tmp_path: Path) -> None:
    """Method: the cache file's time after a second opening, a cut cache, and another text."""
    text = tmp_path / "a.txt"
    text.write_text("one")
    first = tokens_of(tmp_path, text)
    ids = first.ids.tolist()
    (cache,) = (tmp_path / "out" / "tokens").glob("*.bin")
    made = cache.stat().st_mtime_ns
    assert tokens_of(tmp_path, text).fingerprint == first.fingerprint
    assert cache.stat().st_mtime_ns == made
    cache.write_bytes(cache.read_bytes()[:-2])
    assert tokens_of(tmp_path, text).ids.tolist() == ids
    text.write_text("other")
    assert tokens_of(tmp_path, text).fingerprint != first.fingerprint


@pytest.mark.parametrize(
    ("name", "content", "kind", "part"),
    [
        ("none.txt", None, NotFoundError, "there is no file"),
        ("empty.jsonl", "", FormatError, "holds no text"),
        ("bad.jsonl", '{"text": "a"}\n{"text": \n', FormatError, "line 2 is not JSON"),
        ("other.jsonl", '{"body": "a"}\n', FormatError, "no text under `text`, found: body"),
    ],
)
def test_files_that_are_no_text_are_named(
    tmp_path: Path, name: str, content: str | None, kind: type[HoldfastError], part: str
) -> None:
    """Method: each kind of bad file; nothing is left in the cache."""
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    with pytest.raises(kind, match=part):
        tokens_of(tmp_path, path)
    assert not list((tmp_path / "out").rglob("*.bin.*"))


def test_a_tokenizer_file_is_taken_where_there_is_one(tmp_path: Path) -> None:
    """Method: a word-level tokenizer of three words."""
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"[UNK]": 0, "hold": 1, "fast": 2}, unk_token="[UNK]")
    )
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.save(str(tmp_path / "tokenizer.json"))
    opened = open_tokenizer(str(tmp_path))
    assert opened.vocab_size == 3
    assert opened.encode("hold fast now").tolist() == [1, 2, 0]
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(FormatError, match="is not a tokenizer"):
        open_tokenizer(str(tmp_path))
    with pytest.raises(NotFoundError, match="there is no folder"):
        open_tokenizer(str(tmp_path / "none"))
