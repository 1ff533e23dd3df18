// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

// Package atomicfile makes files and symlinks in one step: a reader finds the old one or the new
// one, and nothing in between.
package atomicfile
