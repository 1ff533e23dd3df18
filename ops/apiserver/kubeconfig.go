// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package apiserver

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"go.yaml.in/yaml/v3"

	"github.com/cri-proxy/cri-proxy/ops/process"
)

const (
	// requestTimeout bounds one request to the API server.
	requestTimeout = 30 * time.Second
	// pluginTimeout bounds a credential plugin.
	pluginTimeout = time.Minute
)

// kubeconfig is what is needed of k8s.io/client-go/tools/clientcmd/api/v1.Config. Paths in it are
// relative to the file.
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
	CAData        string `yaml:"certificate-authority-data"`
	TLSServerName string `yaml:"tls-server-name"`
	ProxyURL      string `yaml:"proxy-url"`
	Insecure      bool   `yaml:"insecure-skip-tls-verify"`
}

type user struct {
	Cert      string  `yaml:"client-certificate"`
	CertData  string  `yaml:"client-certificate-data"`
	Key       string  `yaml:"client-key"`
	KeyData   string  `yaml:"client-key-data"`
	Token     string  `yaml:"token"`
	TokenFile string  `yaml:"tokenFile"`
	Exec      *plugin `yaml:"exec"`
}

// plugin is a program that prints credentials, see
// k8s.io/client-go/pkg/apis/clientauthentication/v1.
type plugin struct {
	APIVersion string   `yaml:"apiVersion"`
	Command    string   `yaml:"command"`
	Args       []string `yaml:"args"`
	Env        []struct {
		Name  string `yaml:"name"`
		Value string `yaml:"value"`
	} `yaml:"env"`
}

// Connect reads a kubeconfig and the files that it names, which kubelet rotates, and returns a
// client of its API server. The caller closes it. Nothing is dialled yet. environ is the
// environment of whose file it is: it has the proxies, and an exec plugin gets it. Nil is that of
// this process.
func Connect(ctx context.Context, file string, environ []string) (*Client, error) {
	text, err := os.ReadFile(file)
	if err != nil {
		return nil, fmt.Errorf("kubeconfig: %w", err)
	}
	c, err := clientOf(ctx, text, filepath.Dir(file), environ)
	if err != nil {
		return nil, fmt.Errorf("kubeconfig %s: %w", file, err)
	}
	return c, nil
}

func clientOf(ctx context.Context, text []byte, dir string, environ []string) (*Client, error) {
	if environ == nil {
		environ = os.Environ()
	}
	var k kubeconfig
	if err := yaml.Unmarshal(text, &k); err != nil {
		return nil, err
	}
	cl, u, err := k.current()
	if err != nil {
		return nil, err
	}
	server, err := url.Parse(cl.Server)
	if err != nil || server.Scheme != "https" || server.Host == "" {
		return nil, fmt.Errorf("server %q: want https://host:port", cl.Server)
	}
	if cl.Insecure {
		return nil, errors.New("it skips the verification of the API server's certificate, whose word decides who " +
			"may command this node; give certificate-authority instead")
	}
	settings := &tls.Config{MinVersion: tls.VersionTLS12, ServerName: cl.TLSServerName}
	ca, err := material(dir, "certificate-authority", cl.CA, cl.CAData)
	if err != nil {
		return nil, err
	}
	if ca != nil {
		settings.RootCAs = x509.NewCertPool()
		if !settings.RootCAs.AppendCertsFromPEM(ca) {
			return nil, errors.New("certificate-authority holds no PEM certificate")
		}
	}
	creds, err := u.credentials(ctx, dir, environ)
	if err != nil {
		return nil, err
	}
	user := ""
	if creds.cert != nil {
		pair, err := tls.X509KeyPair(creds.cert, creds.key)
		if err != nil {
			return nil, fmt.Errorf("client-certificate: %w", err)
		}
		settings.Certificates, user = []tls.Certificate{pair}, pair.Leaf.Subject.CommonName
	}
	through := process.Proxies(environ).ProxyFunc()
	transport := &http.Transport{
		TLSClientConfig: settings, TLSHandshakeTimeout: 10 * time.Second, MaxIdleConns: 1,
		Proxy: func(r *http.Request) (*url.URL, error) { return through(r.URL) },
	}
	if cl.ProxyURL != "" {
		proxy, err := url.Parse(cl.ProxyURL)
		if err != nil {
			return nil, fmt.Errorf("proxy-url: %w", err)
		}
		transport.Proxy = http.ProxyURL(proxy)
	}
	c := New(strings.TrimSuffix(server.String(), "/"), creds.token,
		&http.Client{Transport: transport, Timeout: requestTimeout})
	c.user = user
	return c, nil
}

// current returns what the current context names.
func (k *kubeconfig) current() (cl cluster, u user, err error) {
	clusterName, userName, found := "", "", false
	for _, c := range k.Contexts {
		if c.Name == k.CurrentContext {
			clusterName, userName, found = c.Context.Cluster, c.Context.User, true
		}
	}
	if !found {
		return cl, u, fmt.Errorf("no context %q, which current-context names", k.CurrentContext)
	}
	found = false
	for _, c := range k.Clusters {
		if c.Name == clusterName {
			cl, found = c.Cluster, true
		}
	}
	if !found {
		return cl, u, fmt.Errorf("no cluster %q", clusterName)
	}
	for _, c := range k.Users {
		if c.Name == userName {
			return cl, c.User, nil
		}
	}
	return cl, u, fmt.Errorf("no user %q", userName)
}

// credentials are a client certificate as PEM, a token, or both.
type credentials struct {
	cert, key []byte
	token     string
}

func (u *user) credentials(ctx context.Context, dir string, environ []string) (c credentials, err error) {
	if c.cert, err = material(dir, "client-certificate", u.Cert, u.CertData); err != nil {
		return c, err
	}
	if c.key, err = material(dir, "client-key", u.Key, u.KeyData); err != nil {
		return c, err
	}
	switch {
	case u.TokenFile != "":
		token, err := os.ReadFile(beside(dir, u.TokenFile))
		if err != nil {
			return c, fmt.Errorf("tokenFile: %w", err)
		}
		c.token = strings.TrimSpace(string(token))
	case u.Token != "":
		c.token = u.Token
	case u.Exec != nil:
		return u.Exec.run(ctx, dir, environ)
	}
	if (c.cert == nil) != (c.key == nil) {
		return c, errors.New("client-certificate and client-key go together")
	}
	if c.cert == nil && c.token == "" {
		return c, errors.New("the user has no client certificate, no token and no exec plugin: is this kubelet's own " +
			"file, and has kubelet joined the cluster?")
	}
	return c, nil
}

// run asks the plugin.
func (p *plugin) run(ctx context.Context, dir string, environ []string) (c credentials, err error) {
	ctx, cancel := context.WithTimeout(ctx, pluginTimeout)
	defer cancel()
	command := p.Command
	if strings.Contains(command, "/") {
		command = beside(dir, command)
	} else {
		command = process.LookPath(environ, command)
	}
	info, err := json.Marshal(map[string]any{"apiVersion": p.APIVersion, "kind": "ExecCredential",
		"spec": map[string]any{"interactive": false}})
	if err != nil {
		return c, err
	}
	cmd := exec.CommandContext(ctx, command, p.Args...)
	cmd.Env = append(slices.Clone(environ), "KUBERNETES_EXEC_INFO="+string(info))
	for _, e := range p.Env {
		cmd.Env = append(cmd.Env, e.Name+"="+e.Value)
	}
	cmd.WaitDelay = time.Second
	var out bytes.Buffer
	cmd.Stdout = &out // what it prints on standard error may be anything, and is not logged
	if err := cmd.Run(); err != nil {
		return c, fmt.Errorf("exec plugin %s: %w", command, err)
	}
	var answer struct {
		Status struct {
			Token                 string `json:"token"`
			ClientCertificateData string `json:"clientCertificateData"`
			ClientKeyData         string `json:"clientKeyData"`
		} `json:"status"`
	}
	if err := json.Unmarshal(out.Bytes(), &answer); err != nil {
		return c, fmt.Errorf("exec plugin %s printed no ExecCredential", command)
	}
	s := answer.Status
	if s.Token == "" && (s.ClientCertificateData == "" || s.ClientKeyData == "") {
		return c, fmt.Errorf("exec plugin %s gave neither a token nor a certificate with its key", command)
	}
	c.token = s.Token
	if s.ClientCertificateData != "" {
		c.cert, c.key = []byte(s.ClientCertificateData), []byte(s.ClientKeyData)
	}
	return c, nil
}

// material returns data, which is base64, or else what is in file; nil if both are empty.
func material(dir, what, file, data string) ([]byte, error) {
	if data != "" {
		b, err := base64.StdEncoding.DecodeString(data)
		if err != nil {
			return nil, fmt.Errorf("%s-data: %w", what, err)
		}
		return b, nil
	}
	if file == "" {
		return nil, nil
	}
	b, err := os.ReadFile(beside(dir, file))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", what, err)
	}
	return b, nil
}

func beside(dir, path string) string {
	if filepath.IsAbs(path) {
		return path
	}
	return filepath.Join(dir, path)
}
