// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package install

import "time"

const (
	// callTimeout bounds a call over a socket of this machine.
	callTimeout = 5 * time.Second
	// pollInterval is how often a watch checks whether kubelet works.
	pollInterval = 200 * time.Millisecond
)
