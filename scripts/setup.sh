# Sourced by run_train.sh and run_tests.sh. Creates .venv on first use, which takes minutes; later
# calls take milliseconds.
#
#   setup EXTRAS     installs holdfast[EXTRAS] into .venv, unless it is installed already;
#                    `setup ""` accepts any installed extras
#
# PYTHON is the interpreter for .venv (default: python3). If it can import torch, such as a CUDA
# build, .venv uses that torch. Otherwise setup installs torch from the package index.

HOLDFAST_ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

setup() {
    local extras=$1 venv="$HOLDFAST_ROOT/.venv" python=${PYTHON:-python3} wanted
    wanted="$HOLDFAST_ROOT $(cat "$HOLDFAST_ROOT"/{pyproject.toml,constraints.txt} | cksum)"
    is_installed && return
    (
        # Locked: two runs that install at once would corrupt .venv.
        flock 9
        is_installed && exit
        make_venv
    ) 9>"$HOLDFAST_ROOT/.setup.lock"
}

# Succeeds if an earlier setup installed $wanted. A stamp file per set of extras records it.
is_installed() {
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
    echo "setting up $venv (once; takes minutes: torch alone is some hundred MB)" >&2
    [ -x "$venv/bin/python" ] || "$python" -m venv "$venv" || exit 3
    local constraints=(-c "$HOLDFAST_ROOT/constraints.txt") torch_parent
    torch_parent=$("$python" -c 'import importlib.util as u; s = u.find_spec("torch"); print(s.submodule_search_locations[0] + "/..") if s else None' 2>/dev/null)
    if [ -n "$torch_parent" ] && [ "$torch_parent" != None ]; then
        echo "using the torch in $(cd "$torch_parent" && pwd)" >&2
        (cd "$torch_parent" && pwd) >"$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/holdfast-torch.pth"
        constraints=()
    fi
    install "${constraints[@]}" -e "$HOLDFAST_ROOT${extras:+[$extras]}" || {
        echo "the set-up failed; see pip's output above" >&2
        echo "hint: run the same command again; \`rm -r .venv\` starts from scratch" >&2
        exit 3
    }
    printf '%s' "$wanted" >"$venv/holdfast-setup-${extras:-plain}"
}

# Runs pip install and shows its progress; prints its whole output if it fails.
install() {
    local log=$venv/holdfast-setup.log started=$SECONDS status=0 progress
    : >"$log"
    show_progress "$log" 9>&- &
    progress=$!
    "$venv/bin/python" -m pip install --disable-pip-version-check "$@" >"$log" 2>&1 || status=$?
    kill "$progress" 2>/dev/null || true
    wait "$progress" 2>/dev/null || true
    [ ! -t 2 ] || printf '\r\033[K' >&2
    [ "$status" = 0 ] || cat "$log" >&2
    [ "$status" != 0 ] || echo "set up in $((SECONDS - started)) s" >&2
    return "$status"
}

# Shows progress: on a terminal one line that changes every second, otherwise a line every 5 s.
show_progress() {
    local log=$1 started=$SECONDS spent last
    # Ends with the script if that is interrupted. `sleep` gets no output, since a reader of the
    # script's output would wait for it too.
    while sleep 1 >/dev/null 2>&1 && kill -0 $$ 2>/dev/null; do
        spent=$((SECONDS - started))
        # Only lines about longer work: pip prints others, such as on removed files, in between.
        last=$(grep -oE '(Collecting|Downloading|Building|Installing) .*' "$log" | tail -n 1 | cut -c 1-70) || true
        if [ -t 2 ]; then
            printf '\r\033[K%4d s  %s' "$spent" "$last" >&2
        elif [ $((spent % 5)) = 0 ]; then
            echo "$spent s: ${last:-pip is starting}" >&2
        fi
    done
}
