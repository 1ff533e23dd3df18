#!/bin/sh
# Copyright The cri-proxy Authors.
# SPDX-License-Identifier: Apache-2.0

# build.sh DIR assembles the hook for each architecture whose binutils are here
# (Debian: binutils, binutils-aarch64-linux-gnu) into DIR. The results are checked in beside the
# sources: they are what cri-proxy embeds, and a test assembles them anew and compares.
set -eu
out=$1
cd "$(dirname "$0")"
assemble() {
	command -v "$2as" >/dev/null || return 0
	"$2as" -o "$out/$1.o" "hook_$1.S"
	"$2objcopy" -O binary -j .text "$out/$1.o" "$out/hook_$1"
	rm "$out/$1.o"
}
case $(uname -m) in
x86_64) assemble amd64 '' && assemble arm64 aarch64-linux-gnu- ;;
aarch64) assemble arm64 '' && assemble amd64 x86_64-linux-gnu- ;;
esac
