// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

// Package v1beta1 holds the Go types of the API group apps.kruise.io/v1beta1 that
// cri-controller serves: ContainerRecreateRequest, ImagePullJob and
// ImageListPullJob, field by field those of OpenKruise. The same schema is served
// as v1alpha1; docs/adr/0002-versions-of-requests.md says why.
//
// +kubebuilder:object:generate=true
// +groupName=apps.kruise.io
package v1beta1
