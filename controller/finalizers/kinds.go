// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package finalizers

import (
	"k8s.io/apimachinery/pkg/runtime/schema"

	appsv1alpha1 "github.com/cri-proxy/cri-proxy/api/apps/v1alpha1"
	"github.com/cri-proxy/cri-proxy/api/apps/v1beta1"
	inplace "github.com/cri-proxy/cri-proxy/api/inplace/v1alpha1"
)

// The kinds whose objects have finalizers of the controller.
var (
	Requests = schema.GroupKind{Group: appsv1alpha1.GroupVersion.Group, Kind: "ContainerRecreateRequest"}
	Rollouts = schema.GroupKind{Group: inplace.GroupVersion.Group, Kind: "InPlaceRollout"}
	PullJobs = schema.GroupKind{Group: v1beta1.GroupVersion.Group, Kind: "ImagePullJob"}
)
