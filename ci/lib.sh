# shellcheck shell=bash
# Sourced by the scripts of this folder and by kernel-tests/build-kernel: messages, prerequisites, durations.
# Everything said here goes to standard error; standard output belongs to the caller.

say() { printf '%s\n' "$*" >&2; }

die() {
    say "error: $*"
    exit 1
}

# need COMMAND-OR-FILE PACKAGE REASON...
#
# Notes PACKAGE for `install_needed` unless the command is on the path (or, given as an absolute path,
# the file exists).
NEEDED=()
need() {
    local what=$1 package=$2
    shift 2
    case $what in
    /*) [[ -e $what ]] && return ;;
    *) command -v "$what" >/dev/null && return ;;
    esac
    say "missing: $what, from the package $package: $*"
    [[ " ${NEEDED[*]} " == *" $package "* ]] || NEEDED+=("$package")
}

# Installs what `need` noted, and nothing when everything is there.
install_needed() {
    ((${#NEEDED[@]})) || return 0
    local packages=("${NEEDED[@]}")
    NEEDED=()
    command -v apt-get >/dev/null ||
        die "this system has no apt-get; please install: ${packages[*]}"
    ((EUID == 0)) ||
        die "not root; please run: sudo apt-get update && sudo apt-get install --no-install-recommends ${packages[*]}"
    say "installing: ${packages[*]}"
    apt-get update -q </dev/null >&2 || die "apt-get update failed"
    DEBIAN_FRONTEND=noninteractive apt-get install -qy --no-install-recommends "${packages[@]}" </dev/null >&2 ||
        die "apt-get could not install: ${packages[*]}"
}

# step TITLE COMMAND...
#
# Runs the command between two lines that name it, and says how long it took; returns its status. Inside
# a function run this way `set -e` does not hold: it returns or dies by itself.
step() {
    local title=$1 start=$SECONDS status=0
    shift
    say "== $title"
    "$@" || status=$?
    say "== $title: $((SECONDS - start)) s, exit status $status"
    return "$status"
}

# Finds cargo and notes what compiling takes; a Rust toolchain is not installed by itself.
need_rust() {
    command -v cargo >/dev/null || [[ ! -x ${CARGO_HOME:-$HOME/.cargo}/bin/cargo ]] ||
        PATH=${CARGO_HOME:-$HOME/.cargo}/bin:$PATH
    command -v cargo >/dev/null ||
        die "cargo is not on the path; install a Rust toolchain (1.90 or later) as https://rustup.rs describes"
    need cc gcc "the zstd and ring crates compile C sources"
    need /usr/include/stdio.h libc6-dev "C headers, and the files every program is linked with"
}

# need_rust_component NAME SUBCOMMAND
need_rust_component() {
    cargo "$2" --version >/dev/null 2>&1 && return
    command -v rustup >/dev/null || die "cargo $2 is missing; install the component $1 of the Rust toolchain"
    say "installing the Rust component $1"
    rustup component add "$1" </dev/null >&2
}
