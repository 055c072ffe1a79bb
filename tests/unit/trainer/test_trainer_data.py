"""Data: an order and a position that do not depend on the number of ranks."""

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
"""Tokens of 20 samples with a length of 5."""


def loader(dp_rank: int = 0, dp_size: int = 1, *, seed: int = 0, batch: int = 4) -> DataLoader:
    """Make one rank's loader for a global batch of `batch`."""
    return DataLoader(
        tokens=TOKENS,
        seq_len=5,
        seed=seed,
        batch_per_rank=batch // dp_size,
        dp_rank=dp_rank,
        dp_size=dp_size,
    )


def global_batches(loaders: list[DataLoader], count: int) -> torch.Tensor:
    """Return the inputs of `count` steps, ordered by rank within each step."""
    return torch.cat([next(loader)[0] for _ in range(count) for loader in loaders])


@pytest.mark.parametrize("dp_size", [1, 2, 4])
def test_the_order_of_samples_does_not_depend_on_the_number_of_ranks(dp_size: int) -> None:
    """Method: two and a half epochs, compared with one rank."""
    ranks = [loader(rank, dp_size) for rank in range(dp_size)]
    assert torch.equal(global_batches(ranks, 12), global_batches([loader()], 12))


def test_each_epoch_has_every_sample_once_in_an_order_of_its_own() -> None:
    """Method: the first tokens of all samples of two epochs."""
    firsts = global_batches([loader()], 10)[:, 0]
    assert sorted(firsts[:20].tolist()) == list(range(0, 100, 5))
    assert sorted(firsts[20:].tolist()) == list(range(0, 100, 5))
    assert firsts[:20].tolist() != firsts[20:].tolist()


def test_labels_are_the_next_tokens() -> None:
    """Method: consecutive numbers as tokens."""
    inputs, labels = next(loader())
    assert torch.equal(labels, inputs + 1)


@pytest.mark.parametrize("dp_size", [1, 2])
def test_a_loader_continues_after_the_samples_of_another_number_of_ranks(dp_size: int) -> None:
    """Method: seven steps on 4 ranks, their state through JSON, five more steps on fewer ranks."""
    saved = [loader(rank, 4) for rank in range(4)]
    global_batches(saved, 7)
    states = [rank_loader.state_dict() for rank_loader in saved]
    assert all(state == states[0] for state in states)
    resumed = [loader(rank, dp_size) for rank in range(dp_size)]
    for rank_loader in resumed:
        rank_loader.load_state_dict(json.loads(json.dumps(states[0])))
    assert torch.equal(global_batches(resumed, 5), global_batches([loader()], 12)[28:])


def test_a_position_in_other_data_is_refused_with_every_difference_and_a_hint() -> None:
    """Method: a state of another seed and other tokens."""
    state = loader(seed=1).state_dict() | {"fingerprint": "other"}
    with pytest.raises(MismatchError) as raised:
        loader().load_state_dict(state)
    assert "`fingerprint` is other in the checkpoint and fingerprint here" in raised.value.what
    assert "`seed` is 1" in raised.value.what
    assert "--checkpoint.exclude_from_loading dataloader" in (raised.value.hint or "")


def test_data_shorter_than_one_sample_are_refused() -> None:
    """Method: 101 tokens for sequences of 101, which need 102."""
    with pytest.raises(UsageError, match="101 tokens, too few"):
        DataLoader(tokens=TOKENS, seq_len=101, seed=0, batch_per_rank=1)


def tokens_of(tmp_path: Path, path: Path | str) -> Tokens:
    """Open the tokens of a path, cached below `tmp_path`."""
    arguments = ["--job.dump_folder", str(tmp_path / "out"), "--training.dataset_path", str(path)]
    return open_tokens(read_config(arguments), ByteTokenizer())


def test_the_byte_tokenizer_adds_a_begin_and_an_end_token() -> None:
    """Method: a text with a letter of two bytes."""
    assert ByteTokenizer().encode("aé").tolist() == [256, 97, 0xC3, 0xA9, 257]


def test_the_same_text_gives_the_same_tokens_from_any_kind_of_file(tmp_path: Path) -> None:
    """Method: fingerprints of two documents as .txt files, as .jsonl and as .parquet."""
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
    assert len({tokens.fingerprint for tokens in opened}) == 1
    assert bytes(opened[0].ids[1:6].tolist()) == b"first"
    assert len(opened[0].ids) == 5 + 11 + 4


def test_the_token_file_is_rewritten_only_if_it_or_the_text_has_changed(tmp_path: Path) -> None:
    """Method: its modification time after a second opening, a truncated file, another text."""
    text = tmp_path / "a.txt"
    text.write_text("one")
    first = tokens_of(tmp_path, text)
    ids = first.ids.tolist()
    (cache,) = (tmp_path / "out" / "tokens").glob("*.bin")
    written_at = cache.stat().st_mtime_ns
    assert tokens_of(tmp_path, text).fingerprint == first.fingerprint
    assert cache.stat().st_mtime_ns == written_at
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
        ("other.jsonl", '{"body": "a"}\n', FormatError, "text under the key `text`, found: body"),
    ],
)
def test_the_message_for_a_file_without_text_names_the_reason(
    tmp_path: Path, name: str, content: str | None, kind: type[HoldfastError], part: str
) -> None:
    """Method: each kind of file; no temporary file is left in the cache."""
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    with pytest.raises(kind, match=part):
        tokens_of(tmp_path, path)
    assert not list((tmp_path / "out").rglob("*.bin.*"))


def test_a_tokenizer_file_is_used_if_there_is_one(tmp_path: Path) -> None:
    """Method: a word-level tokenizer of three words, a file that is none, a missing folder."""
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
