// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

// Package kstatus sets the conditions Ready, Reconciling and Stalled, by which kstatus (Flux, Argo CD, Helm, kubectl apply --wait of
// several tools) tells what has come to rest from what is at work or has failed. It reads no others of ours.
package kstatus

import (
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// The conditions, as kstatus names them.
const (
	Ready       = "Ready"
	Reconciling = "Reconciling"
	Stalled     = "Stalled"
)

// Standing is how an object stands.
type Standing int

const (
	// AtWork goes on by itself, or waits for something that comes by itself or that the user has asked it to wait for.
	AtWork Standing = iota
	// Current is as the spec says: kstatus' Current.
	Current
	// Failed does not get any further before somebody changes something: kstatus' Failed.
	Failed
)

// Set sets all three, so that kubectl can wait for each to be True or False.
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
