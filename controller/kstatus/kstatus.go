// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

// Package kstatus sets the conditions Ready, Reconciling and Stalled. By these, kstatus (Flux, Argo
// CD, Helm, kubectl apply --wait of several tools) tells an object at rest from one at work and
// from one that has failed. kstatus reads no other condition of ours.
package kstatus

import (
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// The types of the conditions, as kstatus names them.
const (
	Ready       = "Ready"
	Reconciling = "Reconciling"
	Stalled     = "Stalled"
)

// Standing is how an object stands.
type Standing int

const (
	// AtWork says that the object progresses by itself, or waits for something that comes by itself
	// or that the user has asked it to wait for.
	AtWork Standing = iota
	// Current says that the object is as its spec says: kstatus' Current.
	Current
	// Failed says that the object does not progress until somebody changes something: kstatus'
	// Failed.
	Failed
)

// Set sets all three conditions, so that kubectl can wait for each to be True or False.
func Set(conditions *[]metav1.Condition, generation int64, s Standing, reason, message string) {
	for kind, is := range map[string]bool{Ready: s == Current, Reconciling: s == AtWork, Stalled: s == Failed} {
		c := metav1.Condition{Type: kind, Status: metav1.ConditionFalse, Reason: reason, ObservedGeneration: generation}
		if is {
			c.Status = metav1.ConditionTrue
		}
		if is || kind == Ready {
			c.Message = message
		}
		meta.SetStatusCondition(conditions, c)
	}
}
