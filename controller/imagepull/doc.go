// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

// Package imagepull carries out ImagePullJobs and ImageListPullJobs by commanding the nodes.
//
// A job becomes a run: what is known of each of its nodes, and the goroutines that talk to them. A node is surveyed
// first: what it already does or has done for the job is taken over, what the job no longer wants is cancelled. A node
// that answers then waits for its turn to pull; one that does not is tried again and holds up nobody. What a pull is
// called on the node follows from the job alone, so another controller goes on where this one ends, and nodes that are
// done say so from their journal.
//
// Status is written when something has happened that is worth a write: with N nodes at most about 20 + 2√N times in the
// life of a job.
package imagepull
