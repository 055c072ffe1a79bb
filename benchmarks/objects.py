"""Saves to and loads from a server of S3: `python -m benchmarks.objects`.

It starts a server on this machine (`benchmarks/s3_server.py`), or takes the one of
`AWS_ENDPOINT_URL` and the bucket of `HOLDFAST_BENCH_BUCKET`, if that is set. Each measurement has a
process of its own, which has saved and loaded a small state before.

`plain obstore` moves the same bytes without checkpoints: one stream in parts of 8 MiB, four at a
time, and ranges of 8 MiB by 16 threads. Libraries that are not installed are left out:
`pip install s3fs s3torchconnector tenacity`.
"""

from __future__ import annotations

import ctypes
import gc
import importlib.util
import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import count
from pathlib import Path

import torch
from torch import multiprocessing

from benchmarks.meter import Figure, measure, run_rounds
from benchmarks.object_systems import SYSTEMS, State
from benchmarks.options import BenchmarkOptions, parse_options, silence_warnings
from benchmarks.report import OUTCOMES, table
from benchmarks.results import Section, load_sections, save_section
from benchmarks.s3_server import delete_bucket, new_bucket, running_server
from benchmarks.states import llama_like, local_bytes

PLAIN, OURS = "plain obstore", "holdfast"

TIMES_MAX = 1.15
"""Target for the time, as a multiple of the plain transfer's."""

EXTRA_MIB_MAX = 64.0
"""Target for the memory beside the state."""

METHOD = (
    "{gb:.2f} GB, {count} tensors, one process, {server} on the same machine. CPU is that of the "
    "client. Extra memory is its peak beside the state."
)

URLS = count()


def new_url() -> str:
    """Return a URL that nothing is at, in a new bucket if the server is ours."""
    name = f"{os.getpid()}-{next(URLS)}"
    bucket = os.environ.get("HOLDFAST_BENCH_BUCKET")
    return f"s3://{bucket}/{name}" if bucket else f"s3://{new_bucket(f'bucket-{name}')}/data"


def delete(url: str) -> None:
    """Delete everything at a URL, and its bucket if the server is ours."""
    import obstore
    from obstore.store import from_url

    store = from_url(url, client_options={"allow_http": True})
    obstore.delete(store, [one["path"] for page in obstore.list(store) for one in page])
    if "HOLDFAST_BENCH_BUCKET" not in os.environ:
        # SeaweedFS keeps the bytes of deleted objects for minutes, but not those of a bucket.
        delete_bucket(url.split("/")[2])


def measure_in_child(work: Callable[..., Figure], *arguments: object) -> Figure:
    """Run `work` in a new process, which is forked from one that has imported torch and nothing
    else. Tensors are passed in shared memory."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.objects"])
    with ProcessPoolExecutor(1, mp_context=context) as processes:
        return processes.submit(work, *arguments).result()


def measure_save(name: str, url: str, small_url: str, state: State) -> Figure:
    """Save once."""
    _touch(name, small_url, state)
    return measure(lambda: SYSTEMS[name].save(url, state))


def measure_load(name: str, url: str, small_url: str, state: State) -> Figure:
    """Load into memory that exists, and compare every tensor."""
    _touch(name, small_url, state)
    target = {key: torch.full_like(tensor, -1.0) for key, tensor in state.items()}
    figure = measure(lambda: SYSTEMS[name].load(url, target))
    assert all(torch.equal(target[key], state[key]) for key in state), name
    return figure


def _touch(name: str, url: str, state: State) -> None:
    """Import what a system needs, and let the state count as this process's memory."""
    silence_warnings()
    small = {"small": torch.ones(4)}
    SYSTEMS[name].save(url, small)
    SYSTEMS[name].load(url, small)
    for tensor in state.values():
        tensor.sum()
    # Free memory that the process keeps would hide what the system takes.
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def saving(options: BenchmarkOptions, server: str) -> Section:
    """Measure saves."""
    state, small = _shared_state(options.nbytes), new_url()

    def run(name: str) -> Figure:
        url = new_url()
        figure = measure_in_child(measure_save, name, url, f"{small}/{next(URLS)}", state)
        delete(url)
        return figure

    return _section(options, server, "objects_saving", "Saves", state, run)


def loading(options: BenchmarkOptions, server: str) -> Section:
    """Measure loads."""
    state, small = _shared_state(options.nbytes), new_url()
    urls = {name: new_url() for name in _installed()}
    for name, url in urls.items():
        measure_in_child(measure_save, name, url, f"{small}/{next(URLS)}", state)

    def run(name: str) -> Figure:
        return measure_in_child(measure_load, name, urls[name], f"{small}/{next(URLS)}", state)

    return _section(options, server, "objects_loading", "Loads", state, run)


def _section(
    options: BenchmarkOptions,
    server: str,
    name: str,
    title: str,
    state: State,
    run: Callable[[str], Figure],
) -> Section:
    figures = run_rounds({one: partial(run, one) for one in _installed()}, options.rounds)
    nbytes = local_bytes(state)
    method = METHOD.format(gb=nbytes / 1e9, count=len(state), server=server)
    return Section(name, title, method, figures, {"nbytes": nbytes})


def _installed() -> Sequence[str]:
    def is_installed(name: str) -> bool:
        return all(importlib.util.find_spec(module) for module in SYSTEMS[name].modules)

    return [name for name in SYSTEMS if is_installed(name)]


def _shared_state(nbytes: int) -> State:
    state = llama_like(nbytes)
    for tensor in state.values():
        tensor.share_memory_()  # type: ignore[no-untyped-call]
    return dict(state)


@contextmanager
def server_for(folder: Path) -> Iterator[str]:
    """Context with the server that is measured. Yields its name."""
    if "HOLDFAST_BENCH_BUCKET" in os.environ:
        yield "a server"
        return
    with running_server(folder) as name:
        yield name


def page(sections: Sequence[Section]) -> str:
    """The page of results: the targets, and a table for each section."""
    lines = [f"Machine: {sections[0].machine}.", "", "| figure | target | measured | result |"]
    lines += ["|---|---|---|---|"]
    for section in sections:
        ratios = section.ratios(OURS, PLAIN)
        median, memory = statistics.median(ratios), section.most(OURS, "extra_mib")
        spread = f"{median:.2f} ({min(ratios):.2f} to {max(ratios):.2f}) times"
        lines += [
            f"| {section.title}: against the plain transfer | at most {TIMES_MAX} | {spread} "
            f"| {OUTCOMES[median <= TIMES_MAX]} |",
            f"| {section.title}: extra memory | at most {EXTRA_MIB_MAX:.0f} MiB | {memory:.1f} MiB "
            f"| {OUTCOMES[memory <= EXTRA_MIB_MAX]} |",
        ]
    for section in sections:
        rounds = len(section.figures[OURS])
        lines += ["", f"{section.title}: {section.method} Rounds: {rounds}.", ""]
        lines += table(section, compared=(PLAIN,))
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure the parts that the command line names, and write the page."""
    parts = {"saving": saving, "loading": loading}
    options = parse_options(__doc__, tuple(parts), gb=1.0)
    silence_warnings()
    with options.temporary_folder() as folder, server_for(folder) as server:
        for part in options.parts:
            save_section(parts[part](options, server), options.out, add=options.add)
    stored = load_sections(options.out)
    names = [f"objects_{part}" for part in parts if f"objects_{part}" in stored]
    (options.out / "objects.md").write_text(page([stored[name] for name in names]))


if __name__ == "__main__":
    main()
