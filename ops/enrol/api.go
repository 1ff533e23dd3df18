// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package enrol

import (
	"context"
	"net/http"
	"net/url"

	"github.com/cri-proxy/cri-proxy/api/identity"
	"github.com/cri-proxy/cri-proxy/ops/apiserver"
)

// client speaks to an API server.
type client struct{ *apiserver.Client }

// connect reads kubelet's kubeconfig anew.
func connect(ctx context.Context, file string, environ []string) (*client, error) {
	c, err := apiserver.Connect(ctx, file, environ)
	if err != nil {
		return nil, err
	}
	return &client{c}, nil
}

// node is what is needed of a v1.Node.
type node struct {
	Metadata struct {
		UID string `json:"uid"`
	} `json:"metadata"`
	Status struct {
		Addresses []struct {
			Type    string `json:"type"`
			Address string `json:"address"`
		} `json:"addresses"`
	} `json:"status"`
}

func (c *client) node(ctx context.Context, name string) (n node, err error) {
	return n, c.Do(ctx, http.MethodGet, "/api/v1/nodes/"+url.PathEscape(name), nil, &n)
}

// bundle returns the CAs that the controller publishes, as PEM.
func (c *client) bundle(ctx context.Context, namespace string) (string, error) {
	var m struct {
		Data map[string]string `json:"data"`
	}
	err := c.Do(ctx, http.MethodGet, "/api/v1/namespaces/"+url.PathEscape(namespace)+"/configmaps/"+identity.BundleName,
		nil, &m)
	return m.Data[identity.BundleKey], err
}

// signingRequest is what is needed of a certificates.k8s.io/v1 CertificateSigningRequest.
type signingRequest struct {
	APIVersion string `json:"apiVersion"`
	Kind       string `json:"kind"`
	Metadata   struct {
		GenerateName string `json:"generateName,omitempty"`
		Name         string `json:"name,omitempty"`
	} `json:"metadata"`
	Spec struct {
		Request    []byte   `json:"request"`
		SignerName string   `json:"signerName"`
		Usages     []string `json:"usages"`
	} `json:"spec"`
	Status struct {
		Conditions []struct {
			Type    string `json:"type"`
			Reason  string `json:"reason"`
			Message string `json:"message"`
		} `json:"conditions,omitempty"`
		Certificate []byte `json:"certificate,omitempty"`
	} `json:"status"`
}

const requestsPath = "/apis/certificates.k8s.io/v1/certificatesigningrequests"

// request creates a CertificateSigningRequest and returns its name.
func (c *client) request(ctx context.Context, nodeName string, csr []byte) (string, error) {
	var r signingRequest
	r.APIVersion, r.Kind = "certificates.k8s.io/v1", "CertificateSigningRequest"
	r.Metadata.GenerateName = "cri-proxy-" + nodeName + "-"
	r.Spec.Request, r.Spec.SignerName, r.Spec.Usages = csr, identity.SignerName,
		[]string{"digital signature", "server auth"}
	var made signingRequest
	err := c.Do(ctx, http.MethodPost, requestsPath, &r, &made)
	return made.Metadata.Name, err
}

func (c *client) answer(ctx context.Context, name string) (r signingRequest, err error) {
	return r, c.Do(ctx, http.MethodGet, requestsPath+"/"+url.PathEscape(name), nil, &r)
}
