"""The benchmark of planning refuses wrong arguments before it measures."""

from __future__ import annotations

from pathlib import Path

import pytest
from benchmarks import planning


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--sizes", "0"), "--sizes: from 1 to 16384 ranks, found: 0"),
        (("--sizes", "8", "20000"), "--sizes: from 1 to 16384 ranks, found: 20000"),
        (("--load", "--sizes", "1"), "--sizes: from 2 to 16384 ranks, found: 1"),
        (("--out", "missing/table.md"), "--out: a file in an existing folder, found: missing"),
        (("--out", "."), "--out: a file in an existing folder, found: ."),
    ],
)
def test_a_wrong_argument_is_an_error_of_one_line(
    arguments: tuple[str, ...],
    said: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Method: numbers of ranks that no job has, and files that cannot be written."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as raised:
        planning.main(arguments)
    assert (raised.value.code, f"error: {said}" in capsys.readouterr().err) == (2, True)
