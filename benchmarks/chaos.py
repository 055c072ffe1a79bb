"""Kill the saves of other frameworks at every file operation, by the public `ckpt-chaos`, with
Holdfast and without: `python -m benchmarks.chaos hf_trainer lightning_trainer --ranks 1`.

Needs `pip install ckpt-chaos lightning`. Its targets run unchanged: a `sitecustomize` replaces the
class that each imports by the one with Holdfast.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

PATCHES = {
    "hf_trainer": """
import transformers.trainer
import holdfast.hosts.transformers
class Trainer(holdfast.hosts.transformers.HoldfastMixin, transformers.trainer.Trainer):
    pass
transformers.Trainer = transformers.trainer.Trainer = Trainer
""",
    "lightning_trainer": """
import lightning.pytorch
import holdfast.hosts.lightning
class Trainer(lightning.pytorch.Trainer):
    def __init__(self, *args, **kwargs):
        kwargs.setdefault("plugins", [holdfast.hosts.lightning.HoldfastIO()])
        super().__init__(*args, **kwargs)
lightning.pytorch.Trainer = Trainer
""",
}
"""Code that puts Holdfast into each target, by the name of the target."""

VERDICTS = ("PASS", "HARD_FAIL", "SILENT_DIVERGENCE", "LOST_WORK")


def run(target: str, ranks: int, *, patched: bool, folder: Path) -> dict[str, int]:
    """Run all crash points of a target. Returns the number of each verdict."""
    prepended = folder / "prepended"
    prepended.mkdir(parents=True)
    if patched:
        # Only the processes of the target: `ckpt-chaos` itself must not import the framework.
        guard = f"import sys\nif 'ckpt_chaos.targets.{target}' in sys.orig_argv:\n"
        lines = [f"    {line}" for line in PATCHES[target].strip().splitlines()]
        (prepended / "sitecustomize.py").write_text(guard + "\n".join(lines) + "\n")
    command = [sys.executable, "-m", "ckpt_chaos", "bench", target, "--ranks", str(ranks)]
    done = subprocess.run(
        [*command, "--jobs", "1", "--work", str(folder / "runs")],
        env={**os.environ, "CKPT_CHAOS_PREPEND_PYTHONPATH": str(prepended)},
        capture_output=True,
        text=True,
        check=False,
    )
    sys.stderr.write(done.stdout + done.stderr)
    counts = dict(re.findall(r"(\w+): (\d+)", done.stdout.splitlines()[-1]))
    return {verdict: int(counts.get(verdict, 0)) for verdict in VERDICTS}


def main() -> None:
    """Print one row per target, with Holdfast and without."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("targets", nargs="*", default=sorted(PATCHES), choices=sorted(PATCHES))
    parser.add_argument("--ranks", type=int, default=1)
    options = parser.parse_args()
    print("| target | ranks | with Holdfast | " + " | ".join(VERDICTS) + " |")  # noqa: T201
    print("|---|---|---|" + "---|" * len(VERDICTS))  # noqa: T201
    for target in options.targets:
        for patched in (False, True):
            with tempfile.TemporaryDirectory() as folder:
                counts = run(target, options.ranks, patched=patched, folder=Path(folder))
            cells = [target, str(options.ranks), "yes" if patched else "no"]
            cells += [str(counts[verdict]) for verdict in VERDICTS]
            print(f"| {' | '.join(cells)} |", flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
