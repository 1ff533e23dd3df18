// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

// Package backoff waits between attempts.
package backoff
