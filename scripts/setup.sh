# Sourced by run_train.sh and run_tests.sh: makes .venv on first use, costs milliseconds later.
#
#   setup EXTRAS     installs holdfast[EXTRAS] into .venv unless that stands already;
#                    `setup ""` is content with any extras that stand
#
# PYTHON names the interpreter to start from (default: python3). A torch that it can import, such as
# a CUDA build, is used as it is; otherwise torch comes from the package index.

HOLDFAST_ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

setup() {
    local extras=$1 venv="$HOLDFAST_ROOT/.venv" python=${PYTHON:-python3} wanted
    wanted="$HOLDFAST_ROOT $(cat "$HOLDFAST_ROOT"/{pyproject.toml,constraints.txt} | cksum)"
    stands && return
    (
        # Two runs that set up at once would write into one another's .venv.
        flock 9
        stands && exit
        make_venv
    ) 9>"$HOLDFAST_ROOT/.setup.lock"
}

# Whether an earlier set-up brought what is wanted: a file for each set of extras says of what.
stands() {
    local stamp
    for stamp in "$venv"/holdfast-setup-${extras:-*}; do
        [ -f "$stamp" ] && [ "$(<"$stamp")" = "$wanted" ] && return
    done
    return 1
}

make_venv() {
    if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        echo "holdfast needs Python 3.11 or newer: \`$python\` is $("$python" -V 2>&1)" >&2
        echo "hint: PYTHON=/path/to/python3.11 $0" >&2
        exit 3
    fi
    echo "setting up $venv (once; minutes: torch alone is some hundred MB)" >&2
    [ -x "$venv/bin/python" ] || "$python" -m venv "$venv" || exit 3
    local constraints=(-c "$HOLDFAST_ROOT/constraints.txt") torch_at
    torch_at=$("$python" -c 'import importlib.util as u; s = u.find_spec("torch"); print(s.submodule_search_locations[0] + "/..") if s else None' 2>/dev/null)
    if [ -n "$torch_at" ] && [ "$torch_at" != None ]; then
        echo "using the torch in $(cd "$torch_at" && pwd)" >&2
        (cd "$torch_at" && pwd) >"$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/holdfast-torch.pth"
        constraints=()
    fi
    install "${constraints[@]}" -e "$HOLDFAST_ROOT${extras:+[$extras]}" || {
        echo "setting up failed: the lines above are pip's" >&2
        echo "hint: run the same command again; \`rm -r .venv\` starts from nothing" >&2
        exit 3
    }
    printf '%s' "$wanted" >"$venv/holdfast-setup-${extras:-plain}"
}

# pip install, with word every few seconds of what it is at; all that it says where it fails.
install() {
    local log=$venv/holdfast-setup.log started=$SECONDS status=0 progress
    : >"$log"
    say_progress "$log" 9>&- &
    progress=$!
    "$venv/bin/python" -m pip install --disable-pip-version-check "$@" >"$log" 2>&1 || status=$?
    kill "$progress" 2>/dev/null || true
    wait "$progress" 2>/dev/null || true
    [ ! -t 2 ] || printf '\r\033[K' >&2
    [ "$status" = 0 ] || cat "$log" >&2
    [ "$status" != 0 ] || echo "set up in $((SECONDS - started)) s" >&2
    return "$status"
}

# On a terminal one line, renewed every second; in a log a line every five.
say_progress() {
    local log=$1 started=$SECONDS spent last
    # Ends with the script that it speaks for, should that be interrupted. `sleep` holds no output
    # open that somebody reads to its end.
    while sleep 1 >/dev/null 2>&1 && kill -0 $$ 2>/dev/null; do
        spent=$((SECONDS - started))
        # What it has removed or found is no word of what it does for the next minute.
        last=$(grep -oE '(Collecting|Downloading|Building|Installing) .*' "$log" | tail -n 1 | cut -c 1-70) || true
        if [ -t 2 ]; then
            printf '\r\033[K%4d s  %s' "$spent" "$last" >&2
        elif [ $((spent % 5)) = 0 ]; then
            echo "$spent s: ${last:-pip is starting}" >&2
        fi
    done
}
