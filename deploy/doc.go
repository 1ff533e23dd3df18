// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

// Package deploy has no code: its tests hold the manifests together. What kustomize makes of the
// base and helm of the chart must be the same objects, and every permission has its reason in
// docs/RBAC.md.
package deploy
