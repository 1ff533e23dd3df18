// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package v1alpha1

import (
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
)

// GroupVersion is cri-proxy.io/v1alpha1.
var GroupVersion = schema.GroupVersion{Group: "cri-proxy.io", Version: "v1alpha1"}

// AddToScheme registers the types of this package. It never fails.
func AddToScheme(s *runtime.Scheme) error {
	s.AddKnownTypes(GroupVersion, &InPlaceRollout{}, &InPlaceRolloutList{})
	metav1.AddToGroupVersion(s, GroupVersion)
	return nil
}
