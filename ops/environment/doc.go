// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

// Package environment puts into a container's config what kubelet would compute anew: variables,
// command line and mounts with a subPath. The controller has read the API objects; this is the
// rest, which needs the node's files.
package environment
