// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package identity

const (
	// SignerName is the signer of node certificates, in spec.signerName of
	// CertificateSigningRequests: cri-controller.
	SignerName = "cri-proxy.io/node"
	// BundleName is the ConfigMap in the controller's namespace, BundleKey the key in it, with the
	// PEM certificates of who signs both sides.
	BundleName = "cri-proxy-ca"
	// BundleKey is described at [BundleName].
	BundleKey = "ca.crt"
	// ControllerName is the common name in the controller's client certificate.
	ControllerName = "cri-controller"
	// DefaultNamespace is the controller's, unless it has been installed elsewhere.
	DefaultNamespace = "cri-proxy-system"
)
