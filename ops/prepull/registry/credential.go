// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"slices"

	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
)

// AuthConfig returns the credential as CRI takes it; nil for none. containerd's CRI plugin prefers
// a user name to an identity token (ParseAuth). Docker config files may have both, of which only
// the token is good, so a credential with a token goes without its name.
func AuthConfig(c *opsv1.RegistryCredential) *runtimeapi.AuthConfig {
	switch {
	case c == nil:
		return nil
	case c.GetIdentityToken() != "":
		return &runtimeapi.AuthConfig{IdentityToken: c.GetIdentityToken(), RegistryToken: c.GetRegistryToken()}
	default:
		return &runtimeapi.AuthConfig{
			Username: c.GetUsername(), Password: c.GetPassword(), RegistryToken: c.GetRegistryToken(),
		}
	}
}

// SameCredentials reports whether two lists lead to the same attempts.
func SameCredentials(a, b []*opsv1.RegistryCredential) bool {
	return slices.EqualFunc(a, b, func(x, y *opsv1.RegistryCredential) bool { return proto.Equal(x, y) })
}
