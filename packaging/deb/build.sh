#!/bin/sh
# Copyright The cri-proxy Authors.
# SPDX-License-Identifier: Apache-2.0
#
# build.sh BINARY ARCH VERSION DIR: makes the Debian package of a cri-proxy,
# DIR/cri-proxy_VERSION_ARCH.deb, and prints its name. Equal binaries and commits give equal
# packages.
set -eu

[ $# -eq 4 ] || { echo "want: BINARY ARCH VERSION DIR" >&2; exit 2; }
BINARY=$(realpath "$1") ARCH=$2 VERSION=$3
mkdir -p "$4"
out=$(realpath "$4")/cri-proxy_${VERSION}_$ARCH.deb
cd "$(dirname "$0")/../.."
root=$PWD
SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct 2>/dev/null || echo 0)}
WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT
export BINARY ARCH VERSION WORK SOURCE_DATE_EPOCH

cat <<END | gzip -9n >"$WORK/changelog.gz"
cri-proxy ($VERSION) unstable; urgency=medium

  * See https://github.com/cri-proxy/cri-proxy/releases

 -- The cri-proxy Authors <cri-proxy@users.noreply.github.com>  $(date -uRd "@$SOURCE_DATE_EPOCH")
END
gzip -9nc packaging/deb/cri-proxy.8 >"$WORK/cri-proxy.8.gz"

# nfpm is built where its module is, and takes paths from where it runs.
(cd tools/package && CGO_ENABLED=0 GOFLAGS=-mod=readonly go build -trimpath -o "$WORK/nfpm" github.com/goreleaser/nfpm/v2/cmd/nfpm)
cd "$root"
"$WORK/nfpm" package --config packaging/deb/nfpm.yaml --packager deb --target "$out" >/dev/null
echo "$out"
