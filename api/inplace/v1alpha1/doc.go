// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

// Package v1alpha1 holds the Go types of the API group cri-proxy.io/v1alpha1: InPlaceRollout, which
// changes the images of running pods, or restarts their containers, and keeps the pods.
//
// +kubebuilder:object:generate=true
// +groupName=cri-proxy.io
package v1alpha1
