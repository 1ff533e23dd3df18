// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

// Package lost takes care of staged containers that no journal knows.
//
// A container that an operation has made keeps its annotation for life, and an operation that has
// ended is forgotten after an hour. So a token that the journal does not know mostly belongs to a
// container that kubelet has long taken over. But the journal can be lost while a successor is
// hidden: damaged, deleted, put back from a copy. Then only the runtime's list tells what there is:
//
//   - A container that was never started is an operation's: kubelet starts at once what it makes.
//   - A container that is newer than a running one of its slot is a successor that has not taken
//     over: an incumbent never runs on beside a successor that has.
//   - Any other container is what kubelet has to go by, whether it runs or has ended. If it waits
//     at its gate, its incumbent has ended, and it passes.
//
// The first two are strays: they are hidden and taken away, with their gates. Kubelet's policy, and
// kubelet's own next call, deal with what is left.
package lost
