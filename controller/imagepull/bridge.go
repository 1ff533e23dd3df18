// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package imagepull

import (
	"github.com/cri-proxy/cri-proxy/controller/imagepull/list"
	"github.com/cri-proxy/cri-proxy/controller/imagepull/spec"
)

// The names by which the controller's set-up knows what has moved to packages of its own.
type (
	// Limits is spec.Limits.
	Limits = spec.Limits
	// ListReconciler is list.Reconciler.
	ListReconciler = list.Reconciler
)
