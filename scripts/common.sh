# shellcheck shell=bash
# Sourced by the other scripts: where things are, becoming root, packages, cargo. Says what it does on
# standard error only, so that a script's standard output stays its own.

set -euo pipefail

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-$root/target}
# Where scripts/build puts the programs, and where the tests look for them.
export WEFT_BIN_DIR=${WEFT_BIN_DIR:-$CARGO_TARGET_DIR/bin}

say() { printf '%s: %s\n' "${0##*/}" "$*" >&2; }
fail() { say "$*"; exit 1; }

# Cells are namespaces: goes on as root, by sudo if that is what it takes.
become_root() {
    [ "$(id -u)" = 0 ] && return
    command -v sudo >/dev/null || fail "needs root (network namespaces); run it as root"
    exec sudo --preserve-env=CARGO_TARGET_DIR,WEFT_BIN_DIR,WEFT_PACKETS,WEFT_SEEDS,WEFT_PAIRS,WEFT_SCRIPTS,PROPTEST_CASES,NO_COLOR \
        -- "$root/scripts/${0##*/}" "$@"
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
