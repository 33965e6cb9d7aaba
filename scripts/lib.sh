# Sourced by quickstart and test: steps with their time, Debian packages, the virtual environment.
# A failing step ends the script and says what failed and what to do.

set -eu
ROOT=$(cd "$(dirname "$0")/.." && pwd)
LOG=$(mktemp -t ambi-log.XXXXXX)
VENV=$ROOT/.venv
export PATH="$PATH:/usr/local/sbin:/usr/sbin:/sbin"
export DEBIAN_FRONTEND=noninteractive
unset PYTHONPATH PYTHONHOME

fail() { # MESSAGE HINT
    printf 'error: %s\n' "$1" >&2
    [ -z "${2:-}" ] || printf 'hint: %s\n' "$2" >&2
    exit 1
}

now_ms() { echo $(($(date +%s%N) / 1000000)); }

# step TITLE HINT COMMAND...: run COMMAND with its output in the log; print the title and the time it took.
step() {
    _title=$1 _hint=$2
    shift 2
    printf '%-58s ' "$_title"
    _from=$(now_ms)
    if ! "$@" > "$LOG" 2>&1 < /dev/null; then
        printf 'failed\n'
        tail -n 15 "$LOG" >&2
        fail "$_title: failed, the whole output is in $LOG" "$_hint"
    fi
    _took=$(($(now_ms) - _from))
    printf '%4d.%01d s\n' $((_took / 1000)) $((_took % 1000 / 100))
}

need_root() {
    [ "$(id -u)" = 0 ] || fail "this must run as root" "sudo $0"
}

need_debian() {
    command -v apt-get > /dev/null || fail "this is not a Debian system: apt-get is missing" \
        "install the packages that docs/dependencies.md lists by hand, then run this again with AMBI_NO_APT=1"
}

# missing PACKAGE...: those that are not installed.
missing() {
    for _package in "$@"; do
        dpkg-query -W -f '${db:Status-Abbrev}' "$_package" 2> /dev/null | grep -q '^ii' || printf '%s ' "$_package"
    done
}

package_lists() {
    [ -n "$(ls /var/lib/apt/lists/*Packages* 2> /dev/null)" ] || step "Debian package lists" "check the network and /etc/apt" apt-get update -q
}

# here PACKAGE...: of `NEW|OLD` the one that this release has; what was split off in Debian 13 is part of OLD before.
here() {
    for _package in "$@"; do
        case $_package in
        *"|"*) if apt-cache show "${_package%%|*}" > /dev/null 2>&1; then echo "${_package%%|*}"; else echo "${_package##*|}"; fi ;;
        *) echo "$_package" ;;
        esac
    done
}

apt_install() {
    apt-get install -q -y --no-install-recommends "$@" || { apt-get update -q && apt-get install -q -y --no-install-recommends "$@"; }
}

# The names of all installed packages, sorted.
installed() { dpkg-query -W -f '${db:Status-Abbrev} ${Package}\n' | sed -n 's/^ii *//p' | LC_ALL=C sort -u; }

# install PACKAGE...: install what is missing; .installed-packages remembers all that came, for scripts/uninstall.
install() {
    [ -z "${AMBI_NO_APT:-}" ] || return 0
    need_debian
    package_lists
    # shellcheck disable=SC2046
    _missing=$(missing $(here "$@"))
    [ -n "$_missing" ] || return 0
    _before=$(mktemp -t ambi-packages.XXXXXX)
    installed > "$_before"
    # shellcheck disable=SC2086
    step "Debian packages: $(echo "$_missing" | wc -w) missing" "check the network and /etc/apt/sources.list.d; then run this again" apt_install $_missing
    installed | LC_ALL=C comm -13 "$_before" - >> "$ROOT/.installed-packages"
    rm -f "$_before"
}

# make_venv EXTRAS: a virtual environment of Debian's Python with ambi installed from this checkout, made again when stale.
make_venv() {
    _stamp=$VENV/.ambi-stamp
    _want="$(cksum < "$ROOT/pyproject.toml") $1 $ROOT"
    if [ -x "$VENV/bin/ambi" ] && [ "$(cat "$_stamp" 2> /dev/null)" = "$_want" ]; then return 0; fi
    python=/usr/bin/python3
    [ -x $python ] || python=python3
    step "virtual environment in .venv" "apt-get install python3-venv" $python -m venv "$VENV"
    step "Python packages" "check that pip reaches a package index" "$VENV/bin/pip" install -q --disable-pip-version-check -e "$ROOT[$1]"
    echo "$_want" > "$_stamp"
}

PRODUCT_PACKAGES="libnftables1 python3 python3-venv gcc libc6-dev qemu-system-x86 virtiofsd|qemu-system-common e2fsprogs mmdebstrap kmod lz4 ca-certificates dpkg"
