// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package testbed

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"
	"sigs.k8s.io/yaml"
)

// Ports on the bridge address, which belongs to one node of one bed: the usual ones are free unless
// something on the machine listens on all addresses, in which case the bed takes others where it
// can.
const (
	registryPort       = 5000
	etcdPort           = 2379
	apiserverPort      = 6443
	opsPort            = 7443
	proxyMetricsPort   = 9464
	kubeletPort        = 10250
	kubeletHealthzPort = 10248
)

// readyTimeout is generous: a loaded 2-core machine brings up a whole cluster in 15 s.
const readyTimeout = 2 * time.Minute

// serviceCIDR is the same in all beds: without kube-proxy no service address is ever routed.
const serviceCIDR = "10.96.0.0/16"

// NewKubeconfig issues a client certificate for a user in groups and returns the path of a
// kubeconfig that uses it. For a ServiceAccount's permissions the user is
// system:serviceaccount:NAMESPACE:NAME and the group system:serviceaccounts.
func (b *Bed) NewKubeconfig(file, user string, groups ...string) (string, error) {
	pair, err := b.PKI.cluster.issue(b.PKI.Dir, "user-"+file, subject{name: user, groups: groups})
	if err != nil {
		return "", err
	}
	return b.writeKubeconfig(file, pair)
}

func (b *Bed) writeKubeconfig(file string, user Pair) (string, error) {
	type m = map[string]any
	path := filepath.Join(b.Dir, "etc", file+".kubeconfig")
	return path, writeYAML(path, m{
		"apiVersion": "v1", "kind": "Config", "current-context": "bed",
		"clusters": []m{
			{"name": "bed", "cluster": m{"server": b.APIServer, "certificate-authority": b.PKI.ClusterCA.Cert}}},
		"users":    []m{{"name": file, "user": m{"client-certificate": user.Cert, "client-key": user.Key}}},
		"contexts": []m{{"name": "bed", "context": m{"cluster": "bed", "user": file}}},
	})
}

// startControlPlane brings up etcd, the API server, the controller manager and the scheduler, and
// waits for what a first pod needs.
func (b *Bed) startControlPlane(ctx context.Context) error {
	ip := b.BridgeIP
	client := fmt.Sprintf("http://%s:%d", ip, b.etcdPort)
	peer := fmt.Sprintf("http://%s:%d", ip, b.etcdPeerPort)
	etcd, err := b.start("etcd", "etcd",
		"--data-dir", filepath.Join(b.Dir, "etcd"), "--listen-client-urls", client, "--advertise-client-urls", client,
		"--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer, "--initial-cluster", "default="+peer,
		"--unsafe-no-fsync", // the data does not outlive the bed
	)
	if err != nil {
		return err
	}
	if err := etcd.ready(ctx,
		func(ctx context.Context) error { return httpOK(ctx, b.plain, client+"/health") }); err != nil {
		return err
	}
	serving, err := b.PKI.cluster.issue(b.PKI.Dir, "kube-apiserver", subject{name: "kube-apiserver",
		dns: []string{"localhost", "kubernetes", "kubernetes.default", "kubernetes.default.svc"},
		ips: ips(ip, "127.0.0.1", "10.96.0.1")})
	if err != nil {
		return err
	}
	kubeletClient, err := b.PKI.cluster.issue(b.PKI.Dir, "kubelet-client",
		subject{name: "kube-apiserver-kubelet-client", groups: []string{"system:masters"}})
	if err != nil {
		return err
	}
	api, err := b.start("kube-apiserver", "kube-apiserver", append([]string{
		"--etcd-servers", client, "--bind-address", ip, "--advertise-address", ip, "--secure-port",
		strconv.Itoa(b.apiserverPort),
		"--service-cluster-ip-range", serviceCIDR, "--authorization-mode", "Node,RBAC", "--allow-privileged",
		"--tls-cert-file", serving.Cert, "--tls-private-key-file", serving.Key, "--client-ca-file",
		b.PKI.ClusterCA.Cert,
		"--service-account-key-file", b.PKI.serviceAccount.Cert, "--service-account-signing-key-file",
		b.PKI.serviceAccount.Key,
		"--service-account-issuer", "https://kubernetes.default.svc",
		"--kubelet-client-certificate", kubeletClient.Cert, "--kubelet-client-key", kubeletClient.Key,
		"--kubelet-certificate-authority", b.PKI.ClusterCA.Cert,
		// Node names do not resolve here.
		"--kubelet-preferred-address-types", "InternalIP,Hostname",
		// The address that it would announce for the kubernetes service may be one that the API
		// refuses as an endpoint.
		"--endpoint-reconciler-type", "none",
		"--cert-dir", filepath.Join(b.Dir, "apiserver"),
	}, b.options.APIServerArgs...)...)
	if err != nil {
		return err
	}
	if err := api.ready(ctx, func(ctx context.Context) error { return b.apiOK(ctx, "/readyz") }); err != nil {
		return err
	}
	b.step("API server ready")

	manager, err := b.NewKubeconfig("kube-controller-manager", "system:kube-controller-manager")
	if err != nil {
		return err
	}
	scheduler, err := b.NewKubeconfig("kube-scheduler", "system:kube-scheduler")
	if err != nil {
		return err
	}
	if _, err := b.start("kube-controller-manager", "kube-controller-manager", append([]string{
		"--kubeconfig", manager, "--authentication-kubeconfig", manager, "--authorization-kubeconfig", manager,
		"--bind-address", ip,
		"--service-account-private-key-file", b.PKI.serviceAccount.Key, "--root-ca-file", b.PKI.ClusterCA.Cert,
		"--use-service-account-credentials", "--leader-elect=false",
		// The default limit of 20 per second makes its own start last five seconds.
		"--kube-api-qps", "500", "--kube-api-burst", "1000",
	}, b.options.ControllerManagerArgs...)...); err != nil {
		return err
	}
	_, err = b.start("kube-scheduler", "kube-scheduler",
		"--kubeconfig", scheduler, "--authentication-kubeconfig", scheduler, "--authorization-kubeconfig", scheduler,
		"--bind-address", ip, "--leader-elect=false",
		"--kube-api-qps", "500", "--kube-api-burst", "1000",
	)
	return err
}

// waitCluster returns when a pod can be created in the default namespace and run on every node that
// has started.
func (b *Bed) waitCluster(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return b.WaitNamespace(ctx, "default") })
	for _, n := range b.atOnce() {
		g.Go(func() error { return b.WaitNodeReady(ctx, n.NodeName) })
	}
	return g.Wait()
}

// WaitNamespace waits until pods can be created in a namespace: its default ServiceAccount and its
// copy of the cluster CA exist.
func (b *Bed) WaitNamespace(ctx context.Context, namespace string) error {
	return b.process("kube-controller-manager").ready(ctx, func(ctx context.Context) error {
		return errors.Join(b.apiOK(ctx, "/api/v1/namespaces/"+namespace+"/serviceaccounts/default"),
			b.apiOK(ctx, "/api/v1/namespaces/"+namespace+"/configmaps/kube-root-ca.crt"))
	})
}

// CreateNamespace creates a namespace and waits until pods can be created in it.
func (b *Bed) CreateNamespace(ctx context.Context, namespace string) error {
	if _, err := b.Kubectl(ctx, "create", "namespace", namespace); err != nil {
		return err
	}
	return b.WaitNamespace(ctx, namespace)
}

// WaitNodeReady waits for a node's Ready condition. After a restart of kubelet that may be what the
// old one has said: see [Node.RestartKubeletReady].
func (b *Bed) WaitNodeReady(ctx context.Context, name string) error {
	return poll(ctx, func() error {
		_, err := b.nodeReady(ctx, name)
		return err
	})
}

// nodeReady is nil when a node is ready by its condition, of which it returns when kubelet has last
// reported it.
func (b *Bed) nodeReady(ctx context.Context, name string) (reported time.Time, err error) {
	var node struct {
		Status struct {
			Conditions []struct {
				Type, Status, Reason, Message string
				LastHeartbeatTime             time.Time
			}
		}
	}
	if err := b.apiGet(ctx, "/api/v1/nodes/"+name, &node); err != nil {
		return time.Time{}, err
	}
	for _, c := range node.Status.Conditions {
		if c.Type == "Ready" && c.Status != "True" {
			return c.LastHeartbeatTime, fmt.Errorf("node %s is not ready: %s: %s", name, c.Reason, c.Message)
		}
		if c.Type == "Ready" {
			return c.LastHeartbeatTime, nil
		}
	}
	return time.Time{}, fmt.Errorf("node %s has no Ready condition yet", name)
}

// RestartKubeletReady sends sig to kubelet, starts it anew and waits until the new one has said
// that the node is ready.
func (n *Node) RestartKubeletReady(ctx context.Context, sig syscall.Signal) error {
	if err := n.StopKubelet(ctx, sig); err != nil {
		return err
	}
	// After its end: it may have reported until then.
	last, _ := n.bed.nodeReady(ctx, n.NodeName)
	ctx, cancel := context.WithTimeout(ctx, readyTimeout)
	defer cancel()
	// Reports have whole seconds, and the first of the new one must differ.
	if err := poll(ctx, func() error {
		if !time.Now().Truncate(time.Second).After(last) {
			return errors.New("it is the second of the last report")
		}
		return nil
	}); err != nil {
		return err
	}
	if err := n.StartKubelet(ctx); err != nil {
		return err
	}
	return poll(ctx, func() error {
		now, err := n.bed.nodeReady(ctx, n.NodeName)
		if err == nil && !now.After(last) {
			err = fmt.Errorf("kubelet of node %s has not reported since its start", n.NodeName)
		}
		return err
	})
}

// apiClient authenticates as the administrator.
func (b *Bed) apiClient(admin Pair) (*http.Client, error) {
	cert, err := tls.LoadX509KeyPair(admin.Cert, admin.Key)
	if err != nil {
		return nil, err
	}
	pool := x509.NewCertPool()
	ca, err := os.ReadFile(b.PKI.ClusterCA.Cert)
	if err != nil {
		return nil, err
	}
	pool.AppendCertsFromPEM(ca)
	return &http.Client{Timeout: 10 * time.Second,
			Transport: &http.Transport{
				TLSClientConfig: &tls.Config{Certificates: []tls.Certificate{cert}, RootCAs: pool}}},
		nil
}

func (b *Bed) apiOK(ctx context.Context, path string) error {
	return httpOK(ctx, b.api, b.APIServer+path)
}

func (b *Bed) apiGet(ctx context.Context, path string, into any) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, b.APIServer+path, nil)
	if err != nil {
		return err
	}
	resp, err := b.api.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		return err
	}
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("GET %s: %s", path, resp.Status)
	}
	return json.Unmarshal(body, into)
}

// Kubectl runs kubectl as the administrator and returns its standard output. An error carries its
// standard error.
func (b *Bed) Kubectl(ctx context.Context, args ...string) (string, error) {
	return b.kubectl(ctx, nil, args...)
}

// KubectlApply applies YAML documents.
func (b *Bed) KubectlApply(ctx context.Context, documents string) error {
	_, err := b.kubectl(ctx, strings.NewReader(documents), "apply", "-f", "-")
	return err
}

func (b *Bed) kubectl(ctx context.Context, stdin io.Reader, args ...string) (string, error) {
	if b.Mode != ModeCluster {
		return "", errors.New("kubectl needs a bed in Cluster mode")
	}
	cmd := exec.CommandContext(ctx, filepath.Join(b.Bin, "kubectl"), args...)
	// HOME: its discovery cache belongs to the bed.
	cmd.Env = []string{"KUBECONFIG=" + b.Kubeconfig, "HOME=" + b.Dir, "PATH=" + os.Getenv("PATH")}
	cmd.Stdin = stdin
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return string(out), fmt.Errorf("kubectl %s: %w: %s", strings.Join(args, " "), err,
			strings.TrimSpace(stderr.String()))
	}
	return string(out), nil
}

// InstallCRDs applies the checkout's custom resource definitions, which cri-controller needs, and
// waits until they are served.
func (b *Bed) InstallCRDs(ctx context.Context) error {
	if _, err := b.Kubectl(ctx, "apply", "--server-side", "-f", filepath.Join(b.source, "deploy", "crds")); err != nil {
		return err
	}
	if _, err := b.Kubectl(ctx, "wait", "--for=condition=Established", "crd", "--all", "--timeout=60s"); err != nil {
		return err
	}
	// The API server serves them a moment after it has said so.
	out, err := b.Kubectl(ctx, "get", "crd", "-o",
		`jsonpath={range .items[*]}{.spec.group}/{.spec.versions[0].name}/{.spec.names.plural} {end}`)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, readyTimeout)
	defer cancel()
	for resource := range strings.FieldsSeq(out) {
		if err := poll(ctx, func() error { return b.apiOK(ctx, "/apis/"+resource) }); err != nil {
			return err
		}
	}
	return nil
}

// StartController starts cri-controller on the cluster as user [Bed.ControllerKubeconfig] and waits
// until it is ready. args are appended.
func (b *Bed) StartController(ctx context.Context, args ...string) error {
	if b.Mode != ModeCluster {
		return errors.New("cri-controller needs a bed in Cluster mode")
	}
	if err := b.product(ctx, "cri-controller", b.options.ControllerBinary); err != nil {
		return err
	}
	p, err := b.start("cri-controller", "cri-controller", append([]string{
		"--kubeconfig", b.ControllerKubeconfig, "--node-port", strconv.Itoa(b.opsPort),
		"--tls-cert-file", b.PKI.Controller.Cert, "--tls-key-file", b.PKI.Controller.Key, "--tls-ca-file",
		b.PKI.OpsCA.Cert,
		"--metrics-bind-address", b.ControllerMetricsAddress, "--health-probe-bind-address", b.ControllerHealthAddress,
		"--leader-elect=false",
	}, args...)...)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, readyTimeout)
	defer cancel()
	return p.ready(ctx, func(ctx context.Context) error {
		return httpOK(ctx, b.plain, "http://"+b.ControllerHealthAddress+"/readyz")
	})
}

// StopController sends sig to cri-controller and waits for its end.
func (b *Bed) StopController(ctx context.Context, sig syscall.Signal) error {
	return b.stop(ctx, "cri-controller", sig)
}

func writeYAML(path string, v any) error {
	y, err := yaml.Marshal(v)
	if err != nil {
		return err
	}
	return os.WriteFile(path, y, 0o644)
}

// mergeYAML replaces the top-level keys of config by those of extra.
func mergeYAML(config map[string]any, extra string) error {
	over := map[string]any{}
	if err := yaml.Unmarshal([]byte(extra), &over); err != nil {
		return err
	}
	maps.Copy(config, over)
	return nil
}
