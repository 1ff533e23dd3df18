// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package config

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/user"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/sirupsen/logrus"

	"github.com/cri-proxy/cri-proxy/api/identity"
)

// maxSocketPath is sizeof(sockaddr_un.sun_path) less the final NUL, see unix(7).
const maxSocketPath = 107

// namespaceForm is that of a DNS label, as the API server wants it.
var namespaceForm = regexp.MustCompile(`^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$`)

// Complete fills in what depends on the machine: the node name.
func (c *Config) Complete() error {
	if c.NodeName != "" {
		return nil
	}
	name, err := os.Hostname()
	if err != nil {
		return fmt.Errorf("node name: %w; give nodeName (--node-name)", err)
	}
	c.NodeName = strings.ToLower(strings.TrimSpace(name))
	return nil
}

// Validate returns everything that is wrong with c, each with what to do about it. It does not look
// at files and sockets.
func (c *Config) Validate() error {
	var errs []error
	bad := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }

	checkSocket := func(key, path string) bool {
		switch {
		case path == "":
			bad("%s: empty; give an absolute path", key)
		case !filepath.IsAbs(path):
			bad("%s: %q is not an absolute path", key, path)
		case len(path) > maxSocketPath:
			bad("%s: %q is %d bytes long, a socket path takes at most %d; "+
				"choose a shorter one", key, path, len(path), maxSocketPath)
		default:
			return true
		}
		return false
	}
	runtime, err := SocketPath(c.RuntimeEndpoint)
	switch {
	case err != nil:
		bad("runtimeEndpoint: %w", err)
	case !checkSocket("runtimeEndpoint", runtime):
		runtime = ""
	}
	if checkSocket("listen.path", c.Listen.Path) {
		// kubelet chooses legacy cAdvisor stats by this suffix: pkg/kubelet/cadvisor/util.go.
		if strings.HasSuffix(c.Listen.Path, "run/crio/crio.sock") {
			bad("listen.path: kubelet takes a path that ends in run/crio/crio.sock for CRI-O and changes to its " +
				"legacy stats; choose another name")
		}
		if runtime != "" && samePath(c.Listen.Path, runtime) {
			bad("listen.path: %s is the runtime's own socket, calls would go round in a loop; "+
				"leave the runtime's socket where it is, listen elsewhere and point kubelet there", c.Listen.Path)
		}
	}
	if checkSocket("adminSocket", c.AdminSocket) {
		if samePath(c.AdminSocket, c.Listen.Path) || samePath(c.AdminSocket, runtime) {
			bad("adminSocket: %s is also the CRI socket; give the ops API a socket of its own", c.AdminSocket)
		}
	}
	if _, err := c.Listen.UID(); err != nil {
		errs = append(errs, err)
	}
	if _, err := c.Listen.GID(); err != nil {
		errs = append(errs, err)
	}
	if c.Listen.Mode&0o600 != 0o600 {
		bad("listen.mode: %s keeps the owner itself from connecting; use 0600, "+
			"or 0660 with listen.group", c.Listen.Mode)
	}
	if c.Listen.Mode&0o007 != 0 {
		bad("listen.mode: %s lets every user of this machine create containers as root; use 0600, "+
			"or 0660 with listen.group", c.Listen.Mode)
	}
	if !filepath.IsAbs(c.StateDir) {
		bad("stateDir: %q is not an absolute path", c.StateDir)
	}
	if _, err := logrus.ParseLevel(c.Log.Level); err != nil {
		bad("log.level: %q; want trace, debug, info, warning or error", c.Log.Level)
	}
	if !slices.Contains([]string{"text", "json"}, c.Log.Format) {
		bad("log.format: %q; want text or json", c.Log.Format)
	}
	if c.MetricsAddress != "" {
		if err := checkAddress(c.MetricsAddress); err != nil {
			bad("metricsAddress: %w", err)
		}
	}
	if t := c.Tracing; t.Endpoint != "" {
		if host, _, err := net.SplitHostPort(t.Endpoint); err != nil || host == "" || checkAddress(t.Endpoint) != nil {
			bad("tracing.endpoint: %q; want host:port, such as localhost:4317", t.Endpoint)
		}
	} else if t.SamplingRatePerMillion != 0 {
		bad("tracing.endpoint: empty, so samplingRatePerMillion has no effect; " +
			"give host:port of a collector or remove it")
	}
	if r := c.Tracing.SamplingRatePerMillion; r < 0 || r > 1e6 {
		bad("tracing.samplingRatePerMillion: %d; want 0 (only what kubelet traces) to 1000000", r)
	}
	if !slices.Contains([]string{"gate", "pidfd", "plain"}, c.Restart.Method) {
		bad("restart.method: %q; want gate, pidfd or plain", c.Restart.Method)
	}
	if d := c.Restart.CDISpecDir; d != "" && !filepath.IsAbs(d) {
		bad("restart.cdiSpecDir: %q is not an absolute path", d)
	}
	if i := c.Images; i.Parallel < 1 || i.Parallel > 16 {
		bad("images.parallel: %d; want 1 to 16", i.Parallel)
	}
	if c.Images.BytesPerSecond < 0 {
		bad("images.bytesPerSecond: %d is negative; 0 means no bound", c.Images.BytesPerSecond)
	}
	if m := c.Images.MaxDiskPercent; m != LikeKubelet && (m < 0 || m > 100) {
		bad("images.maxDiskPercent: %v; want 0 (not looked at) to 100, or kubelet", m)
	}
	for _, dir := range filepath.SplitList(c.Images.RegistryHostsDir) {
		if !filepath.IsAbs(dir) {
			bad("images.registryHostsDir: %q is not an absolute path", dir)
		}
	}
	if s := c.Kubelet.PodsSocket; s != "" && !filepath.IsAbs(s) {
		bad("kubelet.podsSocket: %q is not an absolute path", s)
	}
	if i := c.Images; (i.CredentialProviderConfig == "") != (i.CredentialProviderBinDir == "") {
		bad("images: credentialProviderConfig and credentialProviderBinDir go together; give both or none")
	}
	for key, path := range map[string]string{
		"credentialProviderConfig": c.Images.CredentialProviderConfig,
		"credentialProviderBinDir": c.Images.CredentialProviderBinDir,
	} {
		if path != "" && !filepath.IsAbs(path) {
			bad("images.%s: %q is not an absolute path", key, path)
		}
	}
	if c.DrainTimeout < 0 {
		bad("drainTimeout: %s is negative; 0 ends calls at once", c.DrainTimeout)
	}
	if c.TakeoverDrainTimeout < 0 {
		bad("upgradeDrainTimeout: %s is negative; 0 ends calls at once", c.TakeoverDrainTimeout)
	}
	return errors.Join(append(errs, c.Ops.validate()...)...)
}

func (o *Ops) validate() (errs []error) {
	bad := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	files := o.CertFile != "" || o.KeyFile != "" || o.ClientCAFile != ""
	if o.Address == "" {
		if files || o.Enrol.Kubeconfig != "" || len(o.AllowedClients) > 0 {
			bad("ops.address: empty, so the other ops settings have no effect; give host:port or remove them")
		}
		return errs
	}
	if err := checkAddress(o.Address); err != nil {
		bad("ops.address: %w", err)
	}
	if o.Enrol.Kubeconfig != "" {
		if files {
			bad("ops: enrol.kubeconfig and certFile, keyFile or clientCAFile exclude each other; " +
				"the certificate is either asked for or given, remove one of the two")
		}
		if !filepath.IsAbs(o.Enrol.Kubeconfig) {
			bad("ops.enrol.kubeconfig: %q is not an absolute path", o.Enrol.Kubeconfig)
		}
		if !namespaceForm.MatchString(o.Enrol.Namespace) {
			bad("ops.enrol.namespace: %q is no namespace; give the one that cri-controller runs in, "+
				"such as %s", o.Enrol.Namespace, identity.DefaultNamespace)
		}
	} else {
		for _, f := range []struct{ key, value, what string }{
			{"ops.certFile", o.CertFile, "the server certificate"},
			{"ops.keyFile", o.KeyFile, "the key of the server certificate"},
			{"ops.clientCAFile", o.ClientCAFile, "the certificates of who signs client certificates"},
		} {
			if f.value == "" {
				bad("%s: empty; the ops API over TCP speaks mutual TLS only, give the PEM file with %s, "+
					"or ops.enrol.kubeconfig to get a certificate from the controller", f.key, f.what)
			}
		}
		if len(o.AllowedClients) == 0 {
			bad("ops.allowedClients: empty, so every client would be refused; " +
				"list the names that client certificates carry")
		}
	}
	if slices.Contains(o.AllowedClients, "") {
		bad("ops.allowedClients: an empty name")
	}
	return errs
}

func checkAddress(a string) error {
	_, port, err := net.SplitHostPort(a)
	if err != nil {
		return fmt.Errorf("%q: want host:port, such as 127.0.0.1:9090 or :9090", a)
	}
	if _, err := strconv.ParseUint(port, 10, 16); err != nil {
		return fmt.Errorf("%q: port %q is no number up to 65535", a, port)
	}
	return nil
}

// SocketPath returns the path of a Unix endpoint given as path, unix:path or unix:///path.
func SocketPath(endpoint string) (string, error) {
	path := endpoint
	for _, prefix := range []string{"unix://", "unix:"} {
		if p, ok := strings.CutPrefix(endpoint, prefix); ok {
			path = p
			break
		}
	}
	if !filepath.IsAbs(path) {
		return "", fmt.Errorf("%q: want unix:///path/to.sock or an absolute path", endpoint)
	}
	return filepath.Clean(path), nil
}

// samePath reports whether both paths lead to the same file, through symlinks such as /var/run too.
func samePath(a, b string) bool {
	return resolve(a) == resolve(b)
}

// resolve follows symlinks as far as the path exists.
func resolve(path string) string {
	path = filepath.Clean(path)
	if real, err := filepath.EvalSymlinks(path); err == nil {
		return real
	}
	if dir := filepath.Dir(path); dir != path {
		return filepath.Join(resolve(dir), filepath.Base(path))
	}
	return path
}

// UID returns the number of the owner, or -1 if none is given.
func (l *Listen) UID() (int, error) {
	return id("listen.owner", l.Owner, func(name string) (string, error) {
		u, err := user.Lookup(name)
		if err != nil {
			return "", err
		}
		return u.Uid, nil
	})
}

// GID returns the number of the group, or -1 if none is given.
func (l *Listen) GID() (int, error) {
	return id("listen.group", l.Group, func(name string) (string, error) {
		g, err := user.LookupGroup(name)
		if err != nil {
			return "", err
		}
		return g.Gid, nil
	})
}

func id(key, value string, lookup func(string) (string, error)) (int, error) {
	if value == "" {
		return -1, nil
	}
	number := value
	if _, err := strconv.ParseUint(value, 10, 31); err != nil {
		if number, err = lookup(value); err != nil {
			return 0, fmt.Errorf("%s: %w; give a name or number that this machine knows", key, err)
		}
	}
	n, err := strconv.Atoi(number)
	if err != nil {
		return 0, fmt.Errorf("%s: %w", key, err)
	}
	return n, nil
}
