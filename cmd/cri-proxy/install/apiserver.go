// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package install

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"go.yaml.in/yaml/v3"
)

// apiServer is the cluster as kubelet may see it: its own Node object.
type apiServer struct {
	client *http.Client
	url    string
	token  string
	// node is the name in the certificate, empty if there is none.
	node string
}

// kubeconfig is what we need of the file (https://kubernetes.io/docs/reference/config-api/kubeconfig.v1/).
type kubeconfig struct {
	CurrentContext string `yaml:"current-context"`
	Contexts       []struct {
		Name    string `yaml:"name"`
		Context struct {
			Cluster string `yaml:"cluster"`
			User    string `yaml:"user"`
		} `yaml:"context"`
	} `yaml:"contexts"`
	Clusters []struct {
		Name    string  `yaml:"name"`
		Cluster cluster `yaml:"cluster"`
	} `yaml:"clusters"`
	Users []struct {
		Name string `yaml:"name"`
		User user   `yaml:"user"`
	} `yaml:"users"`
}

type cluster struct {
	Server        string `yaml:"server"`
	CA            string `yaml:"certificate-authority"`
	CAData        []byte `yaml:"certificate-authority-data"`
	TLSServerName string `yaml:"tls-server-name"`
}

type user struct {
	Cert      string `yaml:"client-certificate"`
	CertData  []byte `yaml:"client-certificate-data"`
	Key       string `yaml:"client-key"`
	KeyData   []byte `yaml:"client-key-data"`
	Token     string `yaml:"token"`
	TokenFile string `yaml:"tokenFile"`
	Exec      *struct {
		APIVersion string   `yaml:"apiVersion"`
		Command    string   `yaml:"command"`
		Args       []string `yaml:"args"`
		Env        []struct {
			Name  string `yaml:"name"`
			Value string `yaml:"value"`
		} `yaml:"env"`
	} `yaml:"exec"`
}

// openAPIServer reads a kubeconfig.
func openAPIServer(ctx context.Context, file string) (*apiServer, error) {
	b, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	var k kubeconfig
	if err := decodeKubeconfig(b, &k); err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	var c cluster
	var u user
	for _, context := range k.Contexts {
		if context.Name != k.CurrentContext {
			continue
		}
		for _, e := range k.Clusters {
			if e.Name == context.Context.Cluster {
				c = e.Cluster
			}
		}
		for _, e := range k.Users {
			if e.Name == context.Context.User {
				u = e.User
			}
		}
	}
	if c.Server == "" {
		return nil, fmt.Errorf("%s: no server in its current context", file)
	}
	a, err := newAPIServer(ctx, filepath.Dir(file), c, u)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	return a, nil
}

// decodeKubeconfig decodes the base64 of the fields that end in -data, as JSON does.
func decodeKubeconfig(b []byte, k *kubeconfig) error {
	var n yaml.Node
	if err := yaml.Unmarshal(b, &n); err != nil {
		return err
	}
	markBinary(&n)
	return n.Decode(k)
}

func markBinary(n *yaml.Node) {
	if n.Kind == yaml.MappingNode {
		for i := 0; i+1 < len(n.Content); i += 2 {
			if v := n.Content[i+1]; strings.HasSuffix(n.Content[i].Value, "-data") && v.Kind == yaml.ScalarNode {
				v.Tag = "!!binary"
			}
		}
	}
	for _, c := range n.Content {
		markBinary(c)
	}
}

func newAPIServer(ctx context.Context, dir string, c cluster, u user) (*apiServer, error) {
	content := func(path string, data []byte) ([]byte, error) {
		if len(data) > 0 || path == "" {
			return data, nil
		}
		if !filepath.IsAbs(path) {
			path = filepath.Join(dir, path)
		}
		return os.ReadFile(path)
	}
	t := &tls.Config{MinVersion: tls.VersionTLS12, ServerName: c.TLSServerName}
	ca, err := content(c.CA, c.CAData)
	if err != nil {
		return nil, err
	}
	if len(ca) > 0 {
		t.RootCAs = x509.NewCertPool()
		t.RootCAs.AppendCertsFromPEM(ca)
	}
	a := &apiServer{url: strings.TrimSuffix(c.Server, "/"), token: u.Token}
	cert, err := content(u.Cert, u.CertData)
	if err != nil {
		return nil, err
	}
	key, err := content(u.Key, u.KeyData)
	if err != nil {
		return nil, err
	}
	token, err := content(u.TokenFile, nil)
	if err != nil {
		return nil, err
	}
	if len(token) > 0 {
		a.token = strings.TrimSpace(string(token))
	}
	if u.Exec != nil {
		if a.token, cert, key, err = runPlugin(ctx, u); err != nil {
			return nil, err
		}
	}
	if len(cert) > 0 {
		pair, err := tls.X509KeyPair(cert, key)
		if err != nil {
			return nil, err
		}
		t.Certificates = []tls.Certificate{pair}
		if leaf, err := x509.ParseCertificate(pair.Certificate[0]); err == nil {
			a.node, _ = strings.CutPrefix(leaf.Subject.CommonName, "system:node:")
		}
	}
	a.client = &http.Client{Timeout: callPatience, Transport: &http.Transport{TLSClientConfig: t, Proxy: http.ProxyFromEnvironment, ForceAttemptHTTP2: true}}
	return a, nil
}

// runPlugin asks a credential plugin (client.authentication.k8s.io).
func runPlugin(ctx context.Context, u user) (token string, cert, key []byte, err error) {
	ctx, cancel := context.WithTimeout(ctx, 4*callPatience)
	defer cancel()
	cmd := exec.CommandContext(ctx, u.Exec.Command, u.Exec.Args...)
	cmd.Env = append(os.Environ(), fmt.Sprintf(`KUBERNETES_EXEC_INFO={"apiVersion":%q,"kind":"ExecCredential","spec":{"interactive":false}}`, u.Exec.APIVersion))
	for _, e := range u.Exec.Env {
		cmd.Env = append(cmd.Env, e.Name+"="+e.Value)
	}
	out, err := cmd.Output()
	if err != nil {
		return "", nil, nil, fmt.Errorf("%s: %w", u.Exec.Command, err)
	}
	var c struct {
		Status struct {
			Token                 string `json:"token"`
			ClientCertificateData string `json:"clientCertificateData"`
			ClientKeyData         string `json:"clientKeyData"`
		} `json:"status"`
	}
	if err := json.Unmarshal(out, &c); err != nil {
		return "", nil, nil, fmt.Errorf("%s: %w", u.Exec.Command, err)
	}
	return c.Status.Token, []byte(c.Status.ClientCertificateData), []byte(c.Status.ClientKeyData), nil
}

// maxAnswer is far above the largest Node object.
const maxAnswer = 8 << 20

// do makes one request and decodes the answer.
func (a *apiServer) do(ctx context.Context, method, path, contentType string, body io.Reader, into any) error {
	req, err := http.NewRequestWithContext(ctx, method, a.url+path, body)
	if err != nil {
		return err
	}
	if a.token != "" {
		req.Header.Set("Authorization", "Bearer "+a.token)
	}
	if contentType != "" {
		req.Header.Set("Content-Type", contentType)
	}
	resp, err := a.client.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer))
	if err != nil {
		return err
	}
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("%s %s: %s: %.200s", method, path, resp.Status, b)
	}
	return json.Unmarshal(b, into)
}

// notReady is nil if kubelet has reported since that the node is ready.
func (a *apiServer) notReady(ctx context.Context, node string, since time.Time) error {
	var n struct {
		Status struct {
			Conditions []struct {
				Type, Status, Reason, Message string
				LastHeartbeatTime             time.Time
			}
		}
	}
	if err := a.do(ctx, http.MethodGet, "/api/v1/nodes/"+url.PathEscape(node), "", nil, &n); err != nil {
		return err
	}
	for _, c := range n.Status.Conditions {
		switch {
		case c.Type != "Ready":
		case c.LastHeartbeatTime.Before(since.Truncate(time.Second)):
			return fmt.Errorf("kubelet has not reported the state of node %s since it was restarted", node)
		case c.Status != "True":
			return fmt.Errorf("node %s is not ready: %s: %s", node, c.Reason, c.Message)
		default:
			return nil
		}
	}
	return errors.New("node " + node + " has no Ready condition")
}

func (a *apiServer) close() {
	if a != nil {
		a.client.CloseIdleConnections()
	}
}
