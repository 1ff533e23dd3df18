// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

// Package cases tests restarts and in-place upgrades with pods as people have them: sources of
// environment that have changed, volumes, memory limits, probes, Jobs. Each goes the whole way,
// from the custom resource to the process, and is judged by what kubelet does with the same pod, or
// by what the processes have written themselves.
//
// All tests share a one-node cluster. Those that restart parts of it run alone and come first.
package cases
