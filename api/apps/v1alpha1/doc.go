// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

// Package v1alpha1 holds the Go types of the API group apps.kruise.io/v1alpha1
// that cri-controller serves: custom resources whose manifests and clients are
// those of OpenKruise, field by field.
//
// +kubebuilder:object:generate=true
// +groupName=apps.kruise.io
package v1alpha1
