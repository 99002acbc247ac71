# Shared by build and dev-hypervisor: the cache, the clean chroot,
# the source and the patch series.  Sourced, not run.
# shellcheck shell=bash

packaging_dir=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
patches_dir=${VMBEAM_XEN_PATCHES:-$packaging_dir/../xen-patches}
cache_dir=${VMBEAM_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/vmbeam}
jobs=${VMBEAM_JOBS:-$(nproc)}
# shellcheck source-path=SCRIPTDIR source=xen.conf
. "$packaging_dir/xen.conf"

# Messages go to stderr: stdout is for results.
say() { printf '[%4ds] %s\n' "$SECONDS" "$*" >&2; }
die() { printf 'error: %s\n' "$*" >&2; exit 1; }

# require COMMAND:PACKAGE...
require() {
  local item
  for item; do
    command -v "${item%%:*}" >/dev/null ||
      die "the command '${item%%:*}' is missing: apt install ${item#*:}"
  done
}

require_root() {
  [ "$(id -u)" = 0 ] || die "run me as root: I create and enter a chroot"
}

# Sets $scratch to an empty directory that vanishes when the script ends.
make_scratch() {
  scratch=$(mktemp -d "${TMPDIR:-/var/tmp}/vmbeam-packaging.XXXXXX")
  trap 'rm -rf "$scratch"' EXIT
}

# lock NAME: waits until no other process has the lock of that name, and keeps
# it until this (sub)shell ends.
lock() {
  mkdir -p "$cache_dir/locks"
  exec {lock_descriptor}>"$cache_dir/locks/$1"
  flock "$lock_descriptor"
}

# hash_of: a short digest of stdin, for names in the cache.
hash_of() { sha256sum | cut -c1-16; }

# The patches of the series, one path per line, in order.
series() {
  local line
  [ -e "$patches_dir/series" ] || return 0
  while read -r line; do
    line=${line%%#*}
    line=${line%"${line##*[![:space:]]}"}
    [ -n "$line" ] || continue
    [ -f "$patches_dir/$line" ] ||
      die "$patches_dir/series names '$line', which does not exist (patch options are not supported)"
    printf '%s\n' "$line"
  done <"$patches_dir/series"
}

# concerns_tools PATCH: whether it touches a file that the tools are built from:
# one outside xen/ that is not mere documentation, or one of tools-inputs.
concerns_tools() {
  local touched
  touched=$(sed -nE -e 's#^(---|\+\+\+) [ab]/([^[:space:]]+).*#\2#p' \
    -e 's#^rename (from|to) (.*)#\2#p' "$1")
  grep -qvE '^(xen/|docs/(misc|specs|designs|features)/|CHANGELOG\.md$|MAINTAINERS$)' <<<"$touched" ||
    grep -qE -f <(grep -v '^#' "$packaging_dir/tools-inputs") <<<"$touched"
}

# version_suffix PART: what its packages' version has after Debian's.
version_suffix() {
  case $1 in
    *-debug) printf '%s\n' "$VERSION_SUFFIX$DEBUG_VERSION_SUFFIX" ;;
    *) printf '%s\n' "$VERSION_SUFFIX" ;;
  esac
}

# debug_patch PART: what PART changes in Debian's packaging besides debian.patch.
debug_patch() {
  case $1 in
    *-debug) cat "$packaging_dir/debug.patch" ;;
  esac
}

# key PART: names everything that the packages of PART (hypervisor,
# hypervisor-debug or tools) are made from.
key() {
  local patch
  {
    printf '%s\n' "$1" "$XEN_DSC_SHA256" "$(version_suffix "$1")" "$SUITE" "${BUILD_DEPENDS[@]}"
    cat "$packaging_dir"/debian/* "$packaging_dir/build-in-chroot"
    debug_patch "$1"
    while read -r patch; do
      if [ "$1" != tools ] || concerns_tools "$patches_dir/$patch"; then
        printf '%s\n' "$patch"
        cat "$patches_dir/$patch"
      fi
    done < <(series)
  } | hash_of
}

# The directory of a pristine root of the target release with all build
# dependencies, created on first use.  Never written to afterwards: builds work
# in an overlay above it.
chroot_dir() (
  local dir temporary
  dir=$cache_dir/chroots/$(printf '%s\n' "$SUITE" "${BUILD_DEPENDS[@]}" | hash_of)
  lock chroot
  if [ ! -d "$dir" ]; then
    require_root
    require mmdebstrap:mmdebstrap
    say "creating a $SUITE root with the build dependencies"
    temporary=$dir.new.$$
    mkdir -p "$temporary"
    mmdebstrap --quiet --mode=root --variant=minbase --format=directory \
      --dpkgopt=force-unsafe-io \
      --dpkgopt='path-exclude=/usr/share/man/*' \
      --dpkgopt='path-exclude=/usr/share/locale/*' \
      --include="$(IFS=,; printf '%s' "${BUILD_DEPENDS[*]}")" \
      "$SUITE" "$temporary" \
      "deb $VMBEAM_DEBIAN_MIRROR $SUITE main" \
      "deb $VMBEAM_DEBIAN_MIRROR $SUITE-updates main" \
      "deb $VMBEAM_DEBIAN_SECURITY_MIRROR $SUITE-security main" >&2 || {
        rm -rf "$temporary"
        die "mmdebstrap failed"
      }
    mv -T "$temporary" "$dir"
    say "root ready"
  fi
  printf '%s\n' "$dir"
)

# The directory that holds the verified source package.
source_dir() (
  local dir file hash url dsc=xen_$XEN_VERSION.dsc
  dir=$cache_dir/sources/xen_$XEN_VERSION
  lock source
  mkdir -p "$dir"
  fetch() { # FILE SHA256
    [ -f "$dir/$1" ] && printf '%s  %s\n' "$2" "$dir/$1" | sha256sum --quiet -c - 2>/dev/null && return
    for url in "$VMBEAM_DEBIAN_MIRROR/pool/main/x/xen" \
      "$VMBEAM_DEBIAN_SECURITY_MIRROR/pool/updates/main/x/xen"; do
      /usr/lib/apt/apt-helper download-file "$url/$1" "$dir/$1" "SHA256:$2" >/dev/null 2>&1 && return
    done
    die "cannot download $1: no longer on the mirrors?  Put it (SHA256 $2) into $dir, or set another version in xen.conf"
  }
  fetch "$dsc" "$XEN_DSC_SHA256"
  while read -r hash _ file; do
    fetch "$file" "$hash"
  done < <(sed -n '/^Checksums-Sha256:/,/^[^ ]/s/^ //p' "$dir/$dsc")
  printf '%s\n' "$dir"
)

# in_chroot WORK COMMAND...: runs it in a throw-away copy of the root, without
# network, with the directory WORK at /work.  All mounts are private to the
# call, and its processes end with the caller.
in_chroot() {
  local work=$1 overlay status=0
  shift
  overlay=$(mktemp -d "$scratch/chroot.XXXXXX")
  mkdir "$overlay/upper" "$overlay/work" "$overlay/root"
  # shellcheck disable=SC2016 # expanded by the inner shell
  setpriv --pdeathsig KILL \
    unshare --mount --propagation slave --pid --net --fork --kill-child sh -euc '
    lower=$1 overlay=$2 work=$3
    shift 3
    root=$overlay/root
    mount -t overlay overlay "$root" \
      -o "lowerdir=$lower,upperdir=$overlay/upper,workdir=$overlay/work"
    mkdir -p "$root/work"
    mount --bind "$work" "$root/work"
    mount -t proc proc "$root/proc"
    mount --rbind /dev "$root/dev"
    exec chroot "$root" env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin \
      HOME=/nonexistent LC_ALL=C.UTF-8 "$@"
  ' sh "$(chroot_dir)" "$overlay" "$work" "$@" || status=$?
  rm -rf "$overlay"
  return "$status"
}

# stage WORK PART: the inputs of build-in-chroot.
stage() {
  local work=$1 part=$2 dir patch
  dir=$(source_dir)
  mkdir -p "$work/source" "$work/patches"
  cp "$dir"/* "$work/source/"
  cp -r "$packaging_dir/debian" "$packaging_dir/build-in-chroot" "$work/"
  debug_patch "$part" >>"$work/debian/debian.patch"
  : >"$work/patches/series"
  while read -r patch; do
    mkdir -p "$(dirname "$work/patches/$patch")"
    cp "$patches_dir/$patch" "$work/patches/$patch"
    printf '%s\n' "$patch" >>"$work/patches/series"
  done < <(series)
}
