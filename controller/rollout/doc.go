// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

// Package rollout carries out InPlaceRollouts. It has nodes prepare new images, patches the pods
// one after the other, and finds out from their status whether they have recovered.
//
// How far a pod is follows from the pod and from its node's operation: the images in its spec, the
// annotation that is written together with them, its readiness gate, its status. What is kept in
// memory only saves questions, or holds back a pod for a moment. Another controller goes on where
// this one ends.
//
// A reconcile looks at all pods of a rollout, finds out how far each is (package evaluate), decides
// which are next (gather.go), and takes those one step further (act.go). The workload's template
// goes along (package workload). Package nodeops tells nodes what to do.
package rollout
