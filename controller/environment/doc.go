// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

// Package environment reads from the API server what kubelet computes at each start of a container:
// the variables of its environment, its command line, and its mounts with a subPath.
package environment
