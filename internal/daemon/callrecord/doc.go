// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

// Package callrecord writes a JSON line for each CRI call to a file, for debugging and for tests
// (--record-calls).
package callrecord
