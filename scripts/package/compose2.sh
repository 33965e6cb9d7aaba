#!/bin/sh
# Fetch Docker Compose 2 for the tests into build/peers: the package of Debian 13, which is a static program, without
# installing it. Lists and archives of that release stay in build/peers, so this machine's own apt is left as it is.
# Ends with 0 and a line on stderr when it cannot be had; the tests that need it are skipped then.
set -eu
PEERS=$(cd "$(dirname "$0")/../.." && pwd)/build/peers
[ ! -x "$PEERS/docker-compose" ] || exit 0
APT=$PEERS/apt
mkdir -p "$APT/lists/partial" "$APT/archives/partial" "$APT/unpacked"
echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] http://deb.debian.org/debian trixie main" > "$APT/sources.list"
: > "$APT/status"

apt() {
    apt-get -q -o "Dir::Etc::SourceList=$APT/sources.list" -o Dir::Etc::SourceParts=/dev/null -o "Dir::State::Lists=$APT/lists" \
        -o "Dir::State::Status=$APT/status" -o "Dir::Cache::Archives=$APT/archives" -o Dir::Cache::PkgCache= \
        -o Dir::Cache::SrcPkgCache= -o APT::Sandbox::User=root -o Acquire::Languages=none "$@"
}

if apt update && (cd "$APT" && apt download docker-compose) && dpkg-deb -x "$APT"/docker-compose_*.deb "$APT/unpacked"; then
    mv "$APT/unpacked/usr/libexec/docker/cli-plugins/docker-compose" "$PEERS/docker-compose"
else
    echo "Docker Compose 2 cannot be had from deb.debian.org: its tests are skipped" >&2
fi
rm -rf "$APT"
