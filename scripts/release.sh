#!/usr/bin/env bash
# Makes a release: checks the changelog, builds the wheel, tests it in a new environment, commits
# and tags.
#
#   scripts/release.sh 0.2.0            set the version, date the changelog, build, test, commit, tag
#   scripts/release.sh --dry-run        check, build and test the current version; change nothing
#   scripts/release.sh 0.2.0 --dry-run  check, build and test another version; change nothing
#
#   PYTHON   interpreter of the new environment (default: python3)
#
# The script publishes nothing: it prints the commands that do. It writes the wheel to dist/.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() {
    echo "error: $1" >&2
    [ -z "${2:-}" ] || echo "hint: $2" >&2
    exit 2
}

version='' dry_run=''
for argument in "$@"; do
    case $argument in
    --dry-run) dry_run=yes ;;
    -*) fail "unknown option \`$argument\`" "scripts/release.sh VERSION [--dry-run]" ;;
    *) version=$argument ;;
    esac
done
present=$(sed -n 's/^version = "\(.*\)"$/\1/p' pyproject.toml)
[ -n "$version$dry_run" ] || fail "no version given" "scripts/release.sh VERSION; the present one is $present"
version=${version:-$present}
[[ $version =~ ^[0-9]+\.[0-9]+\.[0-9]+((a|b|rc)[0-9]+)?$ ]] || fail "\`$version\` is not a version such as 0.2.0 or 0.2.0rc1"

if git rev-parse -q --verify "refs/tags/v$version" >/dev/null; then
    fail "tag \`v$version\` exists" "choose another version; the present one is $present"
fi
if [ -z "$dry_run" ]; then
    [ -z "$(git status --porcelain)" ] || fail "the working tree has changes" "commit or stash them"
    branch=$(git rev-parse --abbrev-ref HEAD)
    [ "$branch" = main ] || fail "releases are made on \`main\`, this is \`$branch\`"
fi
entries=$(awk '/^## \[Unreleased\]/ { on = 1; next } /^(## |<!--)/ { on = 0 } on' CHANGELOG.md | grep -c '^- ') || true
[ "$entries" != 0 ] || fail "CHANGELOG.md has no entry under \`## [Unreleased]\`" "say what users will notice"
echo "version $version: $entries changelog entries"

# Make the release in a copy, so that a failure changes nothing here.
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
git ls-files -z --cached --others --exclude-standard | tar --null --ignore-failed-read -T - -cf - | tar -C "$work" -xf -
sed -i "s/^version = \".*\"$/version = \"$version\"/" "$work/pyproject.toml"
sed -i "s/^## \[Unreleased\]$/## [Unreleased]\n\n## [$version] - $(date -u +%F)/" "$work/CHANGELOG.md"

# Build the wheel, and test it in a new environment.
mkdir -p dist
python=${PYTHON:-python3}
"$python" -m venv "$work/bare"
bare=$work/bare/bin
"$bare/python" -m pip install --quiet --disable-pip-version-check build
"$bare/python" -m build --wheel --outdir "$work/dist" "$work" >"$work/build.log" || {
    cat "$work/build.log" >&2
    exit 3
}
wheel=$(ls "$work"/dist/*.whl)
"$bare/python" -m pip install --quiet --disable-pip-version-check -c constraints.txt "$wheel"
(
    cd "$work/dist" # Python imports from the current folder: not from the sources.
    "$bare/holdfast" version
    [ "$("$bare/python" -c 'import holdfast; print(holdfast.__version__)')" = "$version" ] || fail "the wheel has another version"
    "$bare/python" "$work/examples/plain_loop.py"
    "$bare/python" "$work/examples/plain_loop.py"
    "$bare/python" "$work/examples/read_lazily.py" outputs/plain/step-60 >/dev/null
    "$bare/holdfast" verify outputs/plain
    "$bare/holdfast" skills list >/dev/null
)
cp "$wheel" dist/
echo "built dist/$(basename "$wheel")"

if [ -n "$dry_run" ]; then
    echo "dry run: nothing was changed, committed or tagged"
    exit 0
fi
cp "$work/pyproject.toml" pyproject.toml
cp "$work/CHANGELOG.md" CHANGELOG.md
git commit -q -m "release $version" -- pyproject.toml CHANGELOG.md
git tag -a "v$version" -m "Holdfast $version"
echo "committed and tagged v$version. To publish:"
echo "  git push --follow-tags"
echo "  python -m twine upload dist/$(basename "$wheel")"
