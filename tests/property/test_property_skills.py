"""The sync of skills compared with a model, through any sequence of events."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from holdfast.skills.bundle import Skill
from holdfast.skills.copies import Copies
from holdfast.skills.records import RECEIPT
from holdfast.skills.sync import remove, reset, sync
from skills import CutDisk, CutError, files_in, skill

NAMES = ("alpha", "beta", "gamma")
names = st.sampled_from(NAMES)
releases = st.integers(1, 4)


class Skills(RuleBasedStateMachine):
    """A user's folder of skills, several releases of Holdfast, and the expected files of each
    skill.

    Release `n` ships every skill except one, each with the text `n`, so that skills come and go.
    """

    def __init__(self) -> None:
        super().__init__()
        self.home = Path(tempfile.mkdtemp())
        self.root = self.home / "skills"
        self.foreign: dict[str, dict[str, bytes]] = {}
        self.changed: dict[str, dict[str, bytes]] = {}
        self.own: dict[str, dict[str, bytes]] = {}
        self.deleted: set[str] = set()
        self.count = 0

    def teardown(self) -> None:
        shutil.rmtree(self.home)

    def release(self, release: int) -> dict[str, Skill]:
        left_out = NAMES[release % len(NAMES)]
        return {name: skill(name, str(release)) for name in NAMES if name != left_out}

    def ours(self, name: str) -> bool:
        return (self.root / name / RECEIPT).exists()

    def text(self) -> bytes:
        self.count += 1
        return f"text {self.count}".encode()

    @rule(release=releases, cut=st.integers(0, 60), exchanges=st.booleans())
    def sync(self, release: int, cut: int, exchanges: bool) -> None:
        """Sync. A sync may be interrupted; then sync again."""
        before = {name: self.ours(name) for name in NAMES}

        def at_cut() -> None:
            raise CutError

        shipped, version = self.release(release), f"{release}.0"
        try:
            disk = CutDisk(cut, at_cut, exchanges=exchanges)
            done = sync(shipped, Copies(self.root, disk=disk), version)
        except CutError:
            sync(shipped, Copies(self.root), version)
        else:
            assert not done.problems
        for name, made in shipped.items():
            if name in self.foreign or name in self.changed or name in self.deleted:
                continue
            held = files_in(self.root / name)
            text = made.files["SKILL.md"]
            if not before[name]:
                assert held["SKILL.md"] == text
            assert int(held["SKILL.md"].split()[-1]) >= release, "older than what was synced"

    @rule(name=names, file=st.sampled_from(["SKILL.md", "references/a.md"]))
    def change(self, name: str, file: str) -> None:
        """Change a shipped file by hand."""
        if self.ours(name) and (self.root / name / file).exists():
            (self.root / name / file).write_bytes(self.text())
            self.changed[name] = files_in(self.root / name)

    @rule(name=names, file=st.sampled_from(["mine.md", "own/mine.md", "references/mine.md"]))
    def add(self, name: str, file: str) -> None:
        """Add a file of the user's own."""
        if not self.ours(name):
            return
        path = self.root / name / file
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(self.text())
        self.own.setdefault(name, {})[file] = path.read_bytes()
        if name in self.changed:
            self.changed[name] = files_in(self.root / name)

    @rule(name=names)
    def delete(self, name: str) -> None:
        """Delete the whole copy by hand."""
        if self.ours(name):
            shutil.rmtree(self.root / name)
            self._gone(name)

    @rule(name=names, release=releases)
    def take_away(self, name: str, release: int) -> None:
        """Remove a skill by the command."""
        if name not in self.foreign:
            remove(skill(name, str(release)), Copies(self.root), f"{release}.0")
            self._gone(name)

    @rule(name=names, release=releases)
    def put_back(self, name: str, release: int) -> None:
        """Reset a skill by the command. The user's own files stay."""
        if name in self.foreign:
            return
        made = skill(name, str(release))
        reset(made, Copies(self.root), f"{release}.0")
        self.deleted.discard(name)
        self.changed.pop(name, None)
        assert files_in(self.root / name) == {**made.files, **self.own.get(name, {})}

    @precondition(lambda self: len(self.foreign) < 2)
    @rule(name=names)
    def make(self, name: str) -> None:
        """Make a skill of the user's own."""
        if not (self.root / name).exists():
            (self.root / name).mkdir(parents=True)
            (self.root / name / "SKILL.md").write_bytes(self.text())
            self.foreign[name] = files_in(self.root / name)

    @rule(name=names)
    def unmake(self, name: str) -> None:
        """Delete the user's own skill."""
        if self.foreign.pop(name, None) is not None:
            shutil.rmtree(self.root / name)

    def _gone(self, name: str) -> None:
        self.deleted.add(name)
        self.changed.pop(name, None)
        self.own.pop(name, None)

    @invariant()
    def files_of_the_user_are_not_touched(self) -> None:
        for name, files in {**self.foreign, **self.changed}.items():
            assert files_in(self.root / name) == files
        for name, files in self.own.items():
            assert files.items() <= files_in(self.root / name).items()

    @invariant()
    def deleted_skills_stay_away(self) -> None:
        for name in self.deleted - self.foreign.keys():
            assert not (self.root / name).exists()

    @invariant()
    def every_copy_is_whole(self) -> None:
        for name in NAMES:
            if self.ours(name) and name not in self.changed:
                release = (self.root / name / "SKILL.md").read_text().split()[-1]
                held, whole = files_in(self.root / name), skill(name, release).files
                assert whole.items() <= held.items()


TestSkills = Skills.TestCase
TestSkills.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)
