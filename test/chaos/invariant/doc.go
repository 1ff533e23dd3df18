// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

// Package invariant says what must hold after a restart, or the rollout of an image, whatever broke
// on the way: one running container of the slot, nothing hidden, nothing leaked, neighbours
// untouched, and an operation that tells the truth. It judges facts that others have collected and
// touches nothing.
package invariant
