"""Settings: precedence of their sources, and messages for mistakes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import get_type_hints

import pytest

from holdfast.errors import HoldfastError, NotFoundError, UsageError
from holdfast.trainer import titan
from holdfast.trainer.arguments import prepare_start, read_config
from holdfast.trainer.config import Config


def refused(arguments: list[str]) -> HoldfastError:
    """Return the error for `arguments`."""
    with pytest.raises(HoldfastError) as raised:
        read_config(arguments)
    return raised.value


@pytest.fixture
def toml(tmp_path: Path) -> Path:
    """Write a file with a value of each kind."""
    file = tmp_path / "run.toml"
    file.write_text(
        '[training]\nsteps = 7\n[optimizer]\nlr = 1\nbetas = [0.8, 0.9]\n[model]\nflavor = "8B"\n'
        '[checkpoint]\nenable = true\nexclude_from_loading = ["optimizer"]\n'
    )
    return file


def test_the_command_line_overrides_the_file_and_the_file_the_defaults(toml: Path) -> None:
    """Method: one key from each of the three sources."""
    config = read_config(["--job.config_file", str(toml), "--training.steps", "9"])
    assert config.training.steps == 9
    assert config.model.flavor == "8B"
    assert config.training.seq_len == 2048


def test_values_from_a_file_are_converted_to_the_type_of_their_key(toml: Path) -> None:
    """Method: an integer to a float, lists to tuples."""
    config = read_config([f"--job.config_file={toml}"])
    assert (config.optimizer.lr, type(config.optimizer.lr)) == (1.0, float)
    assert config.optimizer.betas == (0.8, 0.9)
    assert config.checkpoint.exclude_from_loading == ("optimizer",)


def test_flags_turn_on_and_off(toml: Path) -> None:
    """Method: both forms, and both spellings of `no`."""
    file = ["--job.config_file", str(toml)]
    assert read_config(file).checkpoint.enable
    assert not read_config([*file, "--checkpoint.no-enable"]).checkpoint.enable
    assert not read_config([*file, "--checkpoint.no_enable"]).checkpoint.enable
    assert read_config(["--checkpoint.enable"]).checkpoint.enable


@pytest.mark.parametrize(
    "words",
    [
        ["--checkpoint.exclude_from_loading", "dataloader,lr_scheduler"],
        ["--checkpoint.exclude-from-loading=dataloader,lr_scheduler"],
        ["--checkpoint.exclude_from_loading", "dataloader", "lr_scheduler"],
        [
            "--checkpoint.exclude_from_loading",
            "dataloader",
            "--checkpoint.exclude_from_loading",
            "lr_scheduler",
        ],
    ],
)
def test_a_list_can_be_comma_separated_or_repeated(words: list[str]) -> None:
    """Method: four spellings of the same two values."""
    excluded = read_config(words).checkpoint.exclude_from_loading
    assert excluded == ("dataloader", "lr_scheduler")


def test_negative_numbers_and_none_are_accepted_as_values() -> None:
    """Method: a key that may be -1, and an optional one."""
    config = read_config(["--checkpoint.load_step", "-1", "--lr_scheduler.decay_ratio", "none"])
    assert config.checkpoint.load_step == -1
    assert config.lr_scheduler.decay_ratio is None


def test_betas_can_be_set_separately_as_in_torchtitan() -> None:
    """Method: the second alone."""
    assert read_config(["--optimizer.beta2", "0.99"]).optimizer.adam_betas == (0.9, 0.99)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--training.step", "3"], "training.steps"),
        (["--trainin.steps", "3"], "training.steps"),
        (["--training.lr", "3"], "optimizer.lr"),
        (["--model.flavor", "8b"], "8B"),
        (["--lr_scheduler.decay_type", "cosin"], "cosine"),
    ],
)
def test_the_hint_for_an_unknown_name_is_the_nearest_known_one(
    arguments: list[str], named: str
) -> None:
    """Method: misspelt sections, keys and choices."""
    error = refused(arguments)
    assert isinstance(error, UsageError)
    assert f"`{named}`" in (error.hint or "")


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--training.steps", "many"], ["training.steps", "a whole number", "many"]),
        (["--training.steps", "1.5"], ["training.steps", "a whole number", "1.5"]),
        (["--optimizer.lr", "fast"], ["optimizer.lr", "a number", "fast"]),
        (["--optimizer.betas", "0.1,0.2,0.3"], ["optimizer.betas", "2 values", "0.3"]),
        (["--training.steps"], ["training.steps", "needs a value"]),
        (["--checkpoint.enable", "true"], ["checkpoint.enable", "takes no value"]),
        (["steps"], ["steps", "belongs to no setting"]),
        (["--training.steps", "0"], ["training.steps", "at least 1", "0"]),
    ],
)
def test_the_message_for_a_wrong_value_names_key_expected_and_found(
    arguments: list[str], parts: list[str]
) -> None:
    """Method: each kind of mistake on the command line."""
    error = refused(arguments)
    assert isinstance(error, UsageError)
    assert all(part in error.what for part in parts), error.what


def test_a_file_of_torchtitan_is_accepted_and_settings_without_effect_are_listed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Method: keys of TorchTitan 0.1 and 0.2: the same as here, renamed, and without effect. No
    key of Holdfast is among the last."""
    file = tmp_path / "debug_model.toml"
    file.write_text(
        '[job]\ndescription = "debug"\nprint_config = false\n[profiling]\nprofile_freq = 10\n'
        '[model]\nflavor = "debugmodel"\nconverters = ["float8"]\n[debug]\nseed = 7\n'
        "[compile]\nenable = true\n[lr_scheduler]\nlr_min = 0.1\n"
        '[activation_checkpoint]\nmode = "selective"\nselective_ac_option = "op"\n'
        "[checkpoint]\nenable_checkpoint = true\nlast_save_model_weights_only = false\n"
    )
    config = read_config(["--job.config_file", str(file)])
    assert (config.training.seed, config.lr_scheduler.min_lr_factor) == (7, 0.1)
    assert (config.checkpoint.enable, config.checkpoint.last_save_model_only) == (True, False)
    assert config.activation_checkpoint.selective_ac_option == "op"
    prepare_start(config)
    printed = capsys.readouterr().err
    unused = "job.print_config, [profiling], model.converters, [compile]"
    assert f"have no effect here: {unused}" in printed
    sections = get_type_hints(Config)
    for section, keys in sections.items():
        assert not {*titan.WITHOUT_EFFECT.get(section, "").split()} & get_type_hints(keys).keys()
        assert titan.WITHOUT_EFFECT.get(section) != "*"
    assert all(key in get_type_hints(sections[name]) for name, key in titan.RENAMED.values())


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("[training]\nsteps = = 3\n", ["is not TOML", "line 2"]),
        ("[training]\nstep = 3\n", ["training.step", "not known"]),
        ("[trainin]\nsteps = 3\n", ["[trainin]", "not known"]),
        ("training = 3\n", ["training", "must be a section"]),
        ("[training]\nsteps = '3'\n", ["training.steps", "a whole number", "'3'"]),
        ("[training]\nsteps = true\n", ["training.steps", "a whole number", "True"]),
        ("[checkpoint]\nenable = 1\n", ["checkpoint.enable", "true or false", "1"]),
        ("[optimizer]\nname = 'Lion'\n", ["optimizer.name", "AdamW, Adam, SGD", "Lion"]),
        ("[optimizer]\nbetas = [0.9]\n", ["optimizer.betas", "2 values"]),
    ],
)
def test_the_message_for_a_mistake_in_a_file_names_the_file(
    tmp_path: Path, text: str, parts: list[str]
) -> None:
    """Method: each kind of mistake in a TOML file."""
    file = tmp_path / "run.toml"
    file.write_text(text)
    error = refused(["--job.config_file", str(file)])
    assert isinstance(error, UsageError)
    assert all(part in error.what for part in [*parts, str(file)]), error.what


def test_the_hint_for_a_missing_file_is_one_with_a_similar_name(toml: Path) -> None:
    """Method: a file name with one letter too many."""
    error = refused(["--job.config_file", str(toml.with_name("runs.toml"))])
    assert isinstance(error, NotFoundError)
    assert "`run.toml`" in (error.hint or "")


def test_the_hint_for_degrees_that_do_not_fit_has_the_nearest_that_do() -> None:
    """Method: degree 4 on 6 workers, of whose divisors 3 is the nearest to 4."""
    config = read_config(["--parallelism.tensor_parallel_degree", "4"])
    with pytest.raises(UsageError, match="does not fit 6 workers") as raised:
        config.check(6)
    assert "data_parallel_shard_degree 2 " in (raised.value.hint or "")
    assert "tensor_parallel_degree 3" in (raised.value.hint or "")
    degrees = config.parallelism.degrees(8)
    assert {axis: d for axis, d in degrees.items() if d > 1} == {"dp_shard": 2, "tp": 4}


def test_uneven_batch_sizes_and_heads_are_refused() -> None:
    """Method: a global batch of 12 with a local one of 5, and 8 heads on 3 ranks."""
    batch = ["--training.global_batch_size", "12", "--training.local_batch_size", "5"]
    with pytest.raises(UsageError, match="global_batch_size"):
        read_config(batch).check(1)
    with pytest.raises(UsageError, match="8 heads"):
        read_config(["--parallelism.tensor_parallel_degree", "3"]).check(3)


@pytest.mark.parametrize(
    ("workers", "arguments", "reason"),
    [
        (2, "--pipeline_parallel_schedule ZBVZeroBubble", "silently wrong"),
        (2, "--pipeline_parallel_schedule GPip", "did you mean `GPipe`"),
        (2, "--pipeline_parallel_degree 2", "at least 2 microbatches a step"),
        (
            4,
            "--pipeline_parallel_degree 4 --pipeline_parallel_schedule Interleaved1F1B",
            "8 stages",
        ),
        (2, "--pipeline_parallel_degree 2 --model.flavor 1B", "ties its embedding and output"),
        (3, "--context_parallel_degree 3", "must divide `training.seq_len` 2048, found: 3"),
    ],
)
def test_layouts_that_cannot_train_are_refused_with_the_reason(
    workers: int, arguments: str, reason: str
) -> None:
    """Method: settings that torch refuses late, or trains wrongly."""
    words = [
        f"--parallelism.{word[2:]}" if "parallel" in word else word for word in arguments.split()
    ]
    with pytest.raises(UsageError) as raised:
        read_config(words).check(workers)
    assert reason in str(raised.value)


def test_help_lists_every_key_without_importing_torch() -> None:
    """Method: a process that prints at exit whether it has imported torch."""
    code = (
        "import atexit, sys\n"
        "atexit.register(lambda: print('torch' in sys.modules))\n"
        "from holdfast.trainer.__main__ import main\nmain(['--help'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    for key in ("--training.global_batch_size", "--checkpoint.keep_latest_k", "--metrics.log_freq"):
        assert key in done.stdout
    assert "(default: 2048)" in done.stdout
    assert done.stdout.endswith("False\n")


@pytest.mark.parametrize(
    ("given", "expected"), [("auto", "auto"), ("7", 7), ("often", None), ("1.5", None)]
)
def test_a_setting_can_accept_a_number_or_a_word(given: str, expected: object) -> None:
    """Method: `interval` on the command line; the message for other values names both."""
    if expected is not None:
        assert read_config(["--checkpoint.interval", given]).checkpoint.interval == expected
        return
    with pytest.raises(UsageError, match="a whole number, or one of auto, found"):
        read_config(["--checkpoint.interval", given])


def test_a_setting_in_a_file_can_be_a_number_or_a_word(tmp_path: Path) -> None:
    """Method: `interval` in a TOML file."""
    file = tmp_path / "run.toml"
    for text, expected in (('"auto"', "auto"), ("7", 7)):
        file.write_text(f"[checkpoint]\ninterval = {text}\n")
        assert read_config(["--job.config_file", str(file)]).checkpoint.interval == expected
    file.write_text("[checkpoint]\ninterval = true\n")
    with pytest.raises(UsageError, match="a whole number, or one of auto, found: True"):
        read_config(["--job.config_file", str(file)])
