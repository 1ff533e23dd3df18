// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

// Package chaos breaks a part of a real one-node cluster at every step of a restart, or of the
// rollout of an image, and checks what is left: the crash matrix, steps by faults by orders by
// methods. [invariant] says what must hold, [faultproxy] makes the runtime fail on demand.
//
// A plain go test runs a selection; CHAOS=full runs every case. Needs root.
//
// [invariant]: https://pkg.go.dev/github.com/cri-proxy/cri-proxy/test/chaos/invariant
// [faultproxy]: https://pkg.go.dev/github.com/cri-proxy/cri-proxy/test/chaos/faultproxy
package chaos
