// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

// Package rollout carries out InPlaceRollouts: it lets nodes make new images ready, patches the pods when their turn comes,
// and judges by the pods' status what has come of it.
//
// Where a pod stands follows from the pod and from its node's operation: the images in its spec, the annotation that is written
// together with them, its readiness gate, its status. What is kept in memory only spares questions, or holds back a pod for a
// moment; another controller goes on where this one ends.
//
// A reconcile looks at all pods of a rollout, judges each (judge.go), decides which go next (plan.go), and takes those a step
// further (act.go). It never waits for a node: conversations are goroutines (talk.go) that wake it.
package rollout
