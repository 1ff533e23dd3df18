// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

// Package yamledit changes single values of a YAML or JSON file that somebody else keeps: comments,
// order and blank lines stay as they are.
package yamledit
