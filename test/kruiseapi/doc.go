// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

// Package kruiseapi is what a program has that uses OpenKruise's Go types for
// ContainerRecreateRequest, ImagePullJob and ImageListPullJob: types with the fields that
// github.com/openkruise/kruise-api has for v1alpha1 and v1beta1, and a typed client in the way of
// its clientset. The types are our own, after the published fields; a test compares them with the
// schemas in deploy/crds.
package kruiseapi
