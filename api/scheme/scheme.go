// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

// Package scheme has the types that the controllers read and write.
package scheme

import (
	"k8s.io/apimachinery/pkg/runtime"
	clientgoscheme "k8s.io/client-go/kubernetes/scheme"

	appsv1alpha1 "github.com/cri-proxy/cri-proxy/api/apps/v1alpha1"
	"github.com/cri-proxy/cri-proxy/api/apps/v1beta1"
	inplace "github.com/cri-proxy/cri-proxy/api/inplace/v1alpha1"
)

// New returns a scheme with Kubernetes' own types and ours.
func New() (*runtime.Scheme, error) {
	s := runtime.NewScheme()
	if err := clientgoscheme.AddToScheme(s); err != nil {
		return nil, err
	}
	if err := appsv1alpha1.AddToScheme(s); err != nil {
		return nil, err
	}
	if err := v1beta1.AddToScheme(s); err != nil {
		return nil, err
	}
	return s, inplace.AddToScheme(s)
}
