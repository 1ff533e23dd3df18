// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

// Package restart is the [swap.Kind] of a restart: cri-proxy stops the old container and starts the
// new one, kubelet sees the old container running until then, and a stop of kubelet's own in the
// meantime becomes part of the restart.
package restart
