# shellcheck shell=bash
# What the scripts share; sourced by them, from the project's folder.

# A line with the seconds since this script, or the one that called it, began.
export SCRIPT_START=${SCRIPT_START:-$(date +%s)}
stage() { printf '[%4d s] %s\n' "$(($(date +%s) - SCRIPT_START))" "$*"; }

fail() {
    printf '%s: %s\n' "$(basename "$0")" "$*" >&2
    exit 1
}

# Puts the environment that scripts/setup.sh made first on the path.
activate() {
    local folder
    folder=$(cd "${VENV:-.venv}" && pwd)
    export PATH="$folder/bin:$PATH"
}

# Runs a command and shows its output only if it fails.
quietly() { show_only '^$' "$@"; }

# show_only PATTERN COMMAND...: of the command's output, shows the lines that match as they come, and if the
# command fails, the last fifty.
show_only() {
    local pattern=$1 log status=0
    shift
    log=$(mktemp)
    { "$@" 2>&1 || echo $? > "$log.status"; } | tee "$log" | { grep --line-buffered -E "$pattern" || true; } | cut -c 1-160
    if [ -e "$log.status" ]; then
        status=$(cat "$log.status")
        tail -n 50 "$log" >&2
    fi
    rm -f "$log" "$log.status"
    [ "$status" = 0 ] || fail "'$1 ${2:-} ${3:-} ...' failed with status $status (see above)"
}
