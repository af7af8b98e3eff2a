# shellcheck shell=bash
# Sourced by the other scripts: where things are, becoming root, packages, cargo. Says what it does on
# standard error only, so that a script's standard output stays its own.

set -euo pipefail
shopt -s inherit_errexit

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-$root/target}
# Where scripts/build puts the programs, and where the tests look for them.
export WEFT_BIN_DIR=${WEFT_BIN_DIR:-$CARGO_TARGET_DIR/bin}

# What the programs and tests are told in the environment.
passed_on=(CARGO_TARGET_DIR WEFT_BIN_DIR WEFT_FLOOD_ADDS WEFT_FLOOD_RESTARTS WEFT_KILLS WEFT_PACKETS WEFT_PAIRS
    WEFT_REGENERATE WEFT_SCRIPTS WEFT_SEED WEFT_WALKS PROPTEST_CASES NO_COLOR)

say() { printf '%s: %s\n' "${0##*/}" "$*" >&2; }
fail() { say "$*"; exit 1; }

# Cells are namespaces: goes on as root, by sudo if that is what it takes.
become_root() {
    [ "$(id -u)" = 0 ] && return
    command -v sudo >/dev/null || fail "needs root (network namespaces); run it as root"
    exec sudo --preserve-env="$(IFS=, && echo "${passed_on[*]}")" -- "$root/scripts/${0##*/}" "$@"
}

# need PROGRAM PACKAGE [PROGRAM PACKAGE ...]: installs the packages whose program (a command, or a file named by
# its path) is missing.
need() {
    local missing=() name package policy=/usr/sbin/policy-rc.d
    while [ $# -gt 0 ]; do
        name=$1 package=$2
        shift 2
        compgen -G "$name" >/dev/null || PATH=$PATH:/usr/sbin:/sbin command -v "$name" >/dev/null ||
            missing+=("$package")
    done
    [ ${#missing[@]} -gt 0 ] || return 0
    command -v apt-get >/dev/null || fail "install these first (no apt-get here): ${missing[*]}"
    say "installing ${missing[*]}"
    # A database server is needed as a program, not as a service of this machine.
    if [ ! -e $policy ]; then
        trap 'rm -f /usr/sbin/policy-rc.d' EXIT
        printf '#!/bin/sh\nexit 101\n' >$policy
        chmod 755 $policy
    fi
    export DEBIAN_FRONTEND=noninteractive
    apt-get -qq update >&2
    apt-get -qq -o Dpkg::Use-Pty=0 install --no-install-recommends -y "${missing[@]}" >&2
    if [ -n "$(trap -p EXIT)" ]; then
        rm -f $policy
        trap - EXIT
    fi
}

# What every build needs besides Rust: a linker, C for SQLite and ring, libc.a for the static CNI client.
need_compiler() { need cc gcc '/usr/lib/*/libc.a' libc6-dev; }

# What tests execute and compare with, and a compiler.
need_for_tests() {
    need ip iproute2 ping iputils-ping nft nftables iptables iptables tcpdump tcpdump conntrack conntrack \
        '/usr/lib/postgresql/*/bin/postgres' postgresql \
        containerd containerd runc runc busybox busybox-static /usr/lib/cni/tuning containernetworking-plugins
    need_compiler
}

# prepare_tests DIRECTORY: compiles all tests, by whom the target directory belongs to; what root runs them by is in the
# directory then, and the runner's path is printed.
prepare_tests() {
    if ! as_build_user cargo nextest --version >/dev/null 2>&1; then
        say "installing cargo-nextest, once"
        as_build_user cargo install --locked cargo-nextest >&2
    fi
    chmod 755 "$1"
    as_build_user cargo nextest list --workspace --release --locked --list-type binaries-only \
        --message-format json >"$1/binaries"
    as_build_user cargo metadata --format-version 1 --locked >"$1/metadata"
    as_build_user bash -c 'command -v cargo-nextest'
}

# Whose toolchain and target directory are used: who called sudo, if the checkout is theirs.
build_user() {
    local user=${SUDO_USER:-}
    if [ "$(id -u)" = 0 ] && [ -n "$user" ] && [ "$user" != root ] && [ "$(stat -c %U "$root")" = "$user" ]; then
        printf '%s' "$user"
    else
        id -un
    fi
}

# as_build_user COMMAND...: with cargo in its PATH.
as_build_user() {
    local user home cargo_home
    user=$(build_user)
    home=$(getent passwd "$user" | cut -d: -f6)
    cargo_home=${CARGO_HOME:-$home/.cargo}
    if [ "$user" != "$(id -un)" ]; then
        cargo_home=$home/.cargo
        runuser -u "$user" -- env HOME="$home" PATH="$cargo_home/bin:$PATH" "$@"
    elif PATH=$cargo_home/bin:$PATH command -v cargo >/dev/null; then
        PATH=$cargo_home/bin:$PATH "$@"
    else
        # Root builds with the toolchain of the one who called sudo, in root's own cache.
        home=$(getent passwd "${SUDO_USER:-root}" | cut -d: -f6)
        [ -x "$home/.cargo/bin/cargo" ] || fail "cargo is not there: install Rust from https://rustup.rs"
        RUSTUP_HOME=$home/.rustup CARGO_HOME=~root/.cargo PATH=$home/.cargo/bin:$PATH "$@"
    fi
}
