// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package enrol

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
)

// maxAnswer bounds an answer: a Node lists its images and is some 100 KiB at the most.
const maxAnswer = 4 << 20

// client speaks to an API server.
type client struct {
	server string
	token  string
	http   *http.Client
}

func (c *client) close() { c.http.CloseIdleConnections() }

// apiError is a refusal of the API server's.
type apiError struct {
	code    int
	message string
}

// Error says what the API server said.
func (e *apiError) Error() string { return fmt.Sprintf("the API server answers %d: %s", e.code, e.message) }

// isCode tells whether err is an answer of that code.
func isCode(err error, code int) bool {
	var refused *apiError
	return errors.As(err, &refused) && refused.code == code
}

// do sends in, unless it is nil, and reads the answer into out.
func (c *client) do(ctx context.Context, method, path string, in, out any) error {
	var body io.Reader
	if in != nil {
		b, err := json.Marshal(in)
		if err != nil {
			return err
		}
		body = bytes.NewReader(b)
	}
	req, err := http.NewRequestWithContext(ctx, method, c.server+path, body)
	if err != nil {
		return err
	}
	req.Header.Set("Accept", "application/json")
	req.Header.Set("User-Agent", "cri-proxy")
	if in != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	if c.token != "" {
		req.Header.Set("Authorization", "Bearer "+c.token)
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return err // names method and URL
	}
	defer resp.Body.Close()
	answer, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer))
	if err != nil {
		return fmt.Errorf("%s %s: %w", method, path, err)
	}
	if resp.StatusCode/100 != 2 {
		var status struct {
			Message string `json:"message"`
		}
		if json.Unmarshal(answer, &status) != nil || status.Message == "" {
			status.Message = resp.Status
		}
		return &apiError{resp.StatusCode, status.Message}
	}
	if err := json.Unmarshal(answer, out); err != nil {
		return fmt.Errorf("%s %s: %w", method, path, err)
	}
	return nil
}

// node is what is needed of a v1.Node.
type node struct {
	Status struct {
		Addresses []struct {
			Type    string `json:"type"`
			Address string `json:"address"`
		} `json:"addresses"`
	} `json:"status"`
}

func (c *client) node(ctx context.Context, name string) (n node, err error) {
	return n, c.do(ctx, http.MethodGet, "/api/v1/nodes/"+url.PathEscape(name), nil, &n)
}

// bundle returns the CAs that the controller publishes, as PEM.
func (c *client) bundle(ctx context.Context, namespace string) (string, error) {
	var m struct {
		Data map[string]string `json:"data"`
	}
	err := c.do(ctx, http.MethodGet, "/api/v1/namespaces/"+url.PathEscape(namespace)+"/configmaps/"+BundleName, nil, &m)
	return m.Data[BundleKey], err
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
	r.Spec.Request, r.Spec.SignerName, r.Spec.Usages = csr, SignerName, []string{"digital signature", "server auth"}
	var made signingRequest
	err := c.do(ctx, http.MethodPost, requestsPath, &r, &made)
	return made.Metadata.Name, err
}

func (c *client) answer(ctx context.Context, name string) (r signingRequest, err error) {
	return r, c.do(ctx, http.MethodGet, requestsPath+"/"+url.PathEscape(name), nil, &r)
}
