// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

// Package guard keeps a panic in one goroutine from ending the daemon: kubelet's calls are served
// by the same process, and what the goroutine worked on is in a journal, with which the next
// process would panic again.
package guard
