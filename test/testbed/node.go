// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package testbed

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"syscall"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Node is one node of a bed: a containerd, and the proxy and kubelet in front of it.
type Node struct {
	// NodeName is its name in the cluster, unique on this machine.
	NodeName string
	// NodeDir holds its files, RunDir its sockets.
	NodeDir, RunDir string
	// RuntimeSocket is containerd's. ProxySocket is what the proxy listens on and AdminSocket its
	// root-only command socket; the former two are paths, without unix://.
	RuntimeSocket, ProxySocket, AdminSocket string
	// CRISocket is what kubelet dials: ProxySocket, or RuntimeSocket in a direct bed.
	CRISocket string
	// StateDir is where the proxy keeps its journal.
	StateDir string
	// Bridge is the pods' network interface, BridgeIP its address and the node's InternalIP,
	// PodCIDR the pods' network. Of a node in a network namespace, this machine's end of its link
	// is called as its bridge.
	Bridge, BridgeIP, PodCIDR string
	// OpsAddress (host:port) takes node commands over mTLS, MetricsAddress serves the proxy's
	// metrics.
	OpsAddress, MetricsAddress string
	// CgroupParent is the node's cgroup; a CRI client should put its pods below it, as kubelet
	// does.
	CgroupParent string
	// PodLogs is kubelet's directory of container logs.
	PodLogs string
	// KubeletCert serves kubelet's API and is its client identity; OpsCert serves OpsAddress. Both
	// name NodeName and BridgeIP.
	KubeletCert, OpsCert Pair

	bed     *Bed
	prefix  string // of process names, empty on the first node
	network string // CNI
	subnet  netip.Prefix
	netns   string // file of its network namespace, empty for this machine's

	mu        sync.Mutex
	proxyArgs []string // of the last StartProxy, guarded by mu
}

// name returns the name of one of this node's processes within the bed.
func (n *Node) name(component string) string { return n.prefix + component }

// prepare creates all that the node's processes find when they start.
func (n *Node) prepare(ctx context.Context) error {
	for _, d := range []string{n.NodeDir, n.RunDir, n.PodLogs, n.StateDir, n.etc("cni"), n.etc("containerd.d"),
		n.etc("certs.d")} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			return err
		}
	}
	if err := makeCgroup(n.CgroupParent); err != nil {
		return err
	}
	gateway := netip.MustParseAddr(n.BridgeIP)
	if n.netns == "" {
		err := addBridge(ctx, "", n.Bridge, n.subnet, gateway)
		if err != nil {
			return err
		}
	} else if err := n.addNamespace(ctx); err != nil {
		return err
	}
	sub := subject{name: "system:node:" + n.NodeName, groups: []string{"system:nodes"}, dns: []string{n.NodeName},
		ips: []net.IP{gateway.AsSlice()}}
	var err error
	if n.KubeletCert, err = n.bed.PKI.cluster.issue(n.bed.PKI.Dir, n.name("kubelet"), sub); err != nil {
		return err
	}
	sub.name, sub.groups = n.NodeName, nil
	if n.OpsCert, err = n.bed.PKI.ops.issue(n.bed.PKI.Dir, n.name("ops"), sub); err != nil {
		return err
	}
	return errors.Join(n.writeCNI(), n.writeRegistries(), n.writeContainerd(), n.writeProxy())
}

func (n *Node) etc(name string) string { return filepath.Join(n.NodeDir, "etc", name) }

func (n *Node) writeCNI() error {
	type m = map[string]any
	// No masquerading: it would leave iptables rules on the machine, and pods need to reach only
	// this machine.
	return writeJSON(filepath.Join(n.etc("cni"), "10-bridge.conflist"), m{
		"cniVersion": "1.0.0", "name": n.network, "plugins": []m{
			{"type": "bridge", "bridge": n.Bridge, "isGateway": true, "ipMasq": false, "hairpinMode": true, "ipam": m{
				"type": "host-local", "dataDir": filepath.Join(n.NodeDir, "cni"), "routes": []m{{"dst": "0.0.0.0/0"}},
				"ranges": [][]m{{{"subnet": n.PodCIDR, "gateway": n.BridgeIP}}},
			}},
			{"type": "portmap", "capabilities": m{"portMappings": true}},
		},
	})
}

// writeRegistries sends containerd to the bed's registry for every image name.
func (n *Node) writeRegistries() error {
	for _, host := range []string{"_default", "docker.io", n.bed.Registry} {
		if err := n.MapRegistry(host, "http://"+n.bed.Registry); err != nil {
			return err
		}
	}
	return nil
}

// addNamespace makes the node's network namespace and joins it to this machine.
func (n *Node) addNamespace(ctx context.Context) error {
	if err := n.bed.spawner.newNamespace(n.netns); err != nil {
		return err
	}
	return joinNamespace(ctx, n.netns, n.Bridge, n.subnet, netip.MustParseAddr(n.bed.BridgeIP))
}

// start runs a program where the node is.
func (n *Node) start(component string, args ...string) (*Process, error) {
	var env []string
	if component == "containerd" {
		env = n.bed.options.ContainerdEnv
	}
	return n.bed.startIn(n.netns, env, n.name(component), component, args...)
}

// startRuntime starts containerd and the proxy.
func (n *Node) startRuntime(ctx context.Context) error {
	if err := n.StartContainerd(ctx); err != nil || n.bed.options.Direct {
		return err
	}
	return n.StartProxy(ctx)
}

// Join starts a node of Options.Later and waits until it is ready.
func (n *Node) Join(ctx context.Context) error {
	if err := n.startRuntime(ctx); err != nil || n.bed.Mode != ModeCluster {
		return err
	}
	if err := n.StartKubelet(ctx); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, readyTimeout)
	defer cancel()
	return n.bed.WaitNodeReady(ctx, n.NodeName)
}

// StartContainerd starts containerd and waits until it answers CRI calls.
func (n *Node) StartContainerd(ctx context.Context) error {
	p, err := n.start("containerd", n.ContainerdCommand()...)
	if err != nil {
		return err
	}
	return p.ready(ctx, func(ctx context.Context) error { return criAnswers(ctx, n.RuntimeSocket) })
}

// StopContainerd sends sig to containerd and waits for its end. Containers go on under their shims.
func (n *Node) StopContainerd(ctx context.Context, sig syscall.Signal) error {
	return n.bed.stop(ctx, n.name("containerd"), sig)
}

// RestartContainerd is StopContainerd with SIGTERM and StartContainerd.
func (n *Node) RestartContainerd(ctx context.Context) error {
	if err := n.StopContainerd(ctx, syscall.SIGTERM); err != nil {
		return err
	}
	return n.StartContainerd(ctx)
}

// writeProxy writes cri-proxy's configuration.
func (n *Node) writeProxy() error {
	type m = map[string]any
	config := m{
		"listen":          m{"path": n.ProxySocket, "mode": "0660"},
		"runtimeEndpoint": "unix://" + n.RuntimeSocket,
		"stateDir":        n.StateDir,
		"adminSocket":     n.AdminSocket,
		"log":             m{"level": "debug", "format": "text"},
		"metricsAddress":  n.MetricsAddress,
		"nodeName":        n.NodeName,
		"images":          m{"registryHostsDir": n.RegistryHostsDir()},
		"kubelet":         m{"podsSocket": filepath.Join(n.NodeDir, "kubelet", "pods-api", "pods-api.sock")},
		"ops": m{
			"address": n.OpsAddress, "certFile": n.OpsCert.Cert, "keyFile": n.OpsCert.Key,
			"clientCAFile":   n.bed.PKI.OpsCA.Cert,
			"allowedClients": []string{"cri-controller"},
		},
	}
	// without a kubelet, its default threshold would count, on whatever disk this machine has
	if n.bed.Mode == ModeNode {
		config["images"].(m)["maxDiskPercent"] = 0
	}
	if err := mergeYAML(config, n.bed.options.ProxyExtra); err != nil {
		return fmt.Errorf("option ProxyExtra: %w", err)
	}
	return writeYAML(n.ProxyConfig(), config)
}

// RegistryHostsDir is the config_path of containerd's registry configuration; a test may add hosts.
func (n *Node) RegistryHostsDir() string { return n.etc("certs.d") }

// MapRegistry makes images of host come from the server at url, such as https://198.18.0.1:5001.
// more are further lines of the host's entry in hosts.toml.
func (n *Node) MapRegistry(host, url string, more ...string) error {
	dir := filepath.Join(n.RegistryHostsDir(), host)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	hosts := fmt.Sprintf("server = %q\n[host.%q]\n  capabilities = [\"pull\", \"resolve\"]\n", url, url)
	for _, line := range more {
		hosts += "  " + line + "\n"
	}
	return os.WriteFile(filepath.Join(dir, "hosts.toml"), []byte(hosts), 0o644)
}

// ProxyConfig is the proxy's configuration file; a test may edit it before StartProxy.
func (n *Node) ProxyConfig() string { return n.etc("cri-proxy.yaml") }

// StartProxy starts `cri-proxy serve` with the bed's configuration, Options.ProxyArgs and args, and
// waits until it answers.
func (n *Node) StartProxy(ctx context.Context, args ...string) error {
	if err := n.LaunchProxy(ctx, args...); err != nil {
		return err
	}
	return n.WaitProxyReady(ctx)
}

// LaunchProxy is StartProxy without the wait, for a proxy that is meant to die or wait on its way
// up.
func (n *Node) LaunchProxy(ctx context.Context, args ...string) error {
	if err := n.bed.product(ctx, "cri-proxy", n.bed.options.ProxyBinary); err != nil {
		return err
	}
	n.mu.Lock()
	n.proxyArgs = args
	n.mu.Unlock()
	all := append([]string{"serve", "--config", n.ProxyConfig()}, n.bed.options.ProxyArgs...)
	_, err := n.start("cri-proxy", append(all, args...)...)
	return err
}

// KillProxy sends sig to the proxy and waits for its end.
func (n *Node) KillProxy(ctx context.Context, sig syscall.Signal) error {
	return n.bed.stop(ctx, n.name("cri-proxy"), sig)
}

// RestartProxy is KillProxy with sig and StartProxy with the arguments of last time.
func (n *Node) RestartProxy(ctx context.Context, sig syscall.Signal) error {
	if err := n.KillProxy(ctx, sig); err != nil {
		return err
	}
	n.mu.Lock()
	args := n.proxyArgs
	n.mu.Unlock()
	return n.StartProxy(ctx, args...)
}

// WaitProxyReady waits until a CRI call through the proxy is answered.
func (n *Node) WaitProxyReady(ctx context.Context) error {
	p := n.bed.process(n.name("cri-proxy"))
	if p == nil {
		return errors.New("the proxy has not been started")
	}
	return p.ready(ctx, func(ctx context.Context) error { return criAnswers(ctx, n.ProxySocket) })
}

// writeKubelet writes the KubeletConfiguration. Its settings that look odd make kubelet run beside
// others on a machine that it does not own.
func (n *Node) writeKubelet() error {
	type m = map[string]any
	config := m{
		"apiVersion": "kubelet.config.k8s.io/v1beta1", "kind": "KubeletConfiguration",
		"address": n.BridgeIP, "port": kubeletPort, "healthzBindAddress": n.BridgeIP, "healthzPort": kubeletHealthzPort,
		"containerRuntimeEndpoint": "unix://" + n.CRISocket,
		"authentication": m{"anonymous": m{"enabled": false}, "webhook": m{"enabled": true},
			"x509": m{"clientCAFile": n.bed.PKI.ClusterCA.Cert}},
		"authorization": m{"mode": "Webhook"},
		"tlsCertFile":   n.KubeletCert.Cert, "tlsPrivateKeyFile": n.KubeletCert.Key,
		"cgroupDriver": "cgroupfs", "cgroupRoot": n.CgroupParent, "enforceNodeAllocatable": []string{},
		"failCgroupV1": false, "failSwapOn": false, "oomScoreAdj": 0, "localStorageCapacityIsolation": false,
		"makeIPTablesUtilChains": false,
		"podLogsDir":             n.PodLogs, "volumePluginDir": filepath.Join(n.NodeDir, "volume-plugins"),
		"evictionHard": m{"memory.available": "50Mi", "nodefs.available": "1%",
			"imagefs.available": "1%"},
		"imageGCHighThresholdPercent": 100,
		"maxPods":                     500,
		"clusterDNS":                  []string{"10.96.0.10"}, "clusterDomain": "cluster.local",
	}
	if err := mergeYAML(config, n.bed.options.KubeletExtra); err != nil {
		return fmt.Errorf("option KubeletExtra: %w", err)
	}
	return writeYAML(n.etc("kubelet.yaml"), config)
}

// KubeletKubeconfig is the file with kubelet's credentials, once kubelet has been started.
func (n *Node) KubeletKubeconfig() string {
	return filepath.Join(n.bed.Dir, "etc", n.name("kubelet")+".kubeconfig")
}

// KubeletCommand writes kubelet's configuration and returns its command line, without the program,
// for a test that starts it in its own way.
func (n *Node) KubeletCommand() ([]string, error) {
	if err := n.writeKubelet(); err != nil {
		return nil, err
	}
	conf, err := n.bed.writeKubeconfig(n.name("kubelet"), n.KubeletCert)
	if err != nil {
		return nil, err
	}
	root := filepath.Join(n.NodeDir, "kubelet")
	return append([]string{
		"--config", n.etc("kubelet.yaml"), "--kubeconfig", conf, "--hostname-override", n.NodeName,
		"--node-ip", n.BridgeIP,
		"--root-dir", root, "--cert-dir", filepath.Join(root, "pki"), "--v", "2",
	}, n.bed.options.KubeletArgs...), nil
}

// ContainerdCommand is that of containerd.
func (n *Node) ContainerdCommand() []string {
	return []string{"--config", n.ContainerdConfigFile()}
}

// KubeletHealthz is host:port of kubelet's health check.
func (n *Node) KubeletHealthz() string {
	return net.JoinHostPort(n.BridgeIP, strconv.Itoa(kubeletHealthzPort))
}

// Netns is the file of the node's network namespace, empty for this machine's.
func (n *Node) Netns() string { return n.netns }

// StartKubelet starts kubelet and waits until it is healthy. It does not wait for the node to be
// Ready, see [Bed.WaitNodeReady].
func (n *Node) StartKubelet(ctx context.Context) error {
	args, err := n.KubeletCommand()
	if err != nil {
		return err
	}
	p, err := n.start("kubelet", args...)
	if err != nil {
		return err
	}
	url := "http://" + n.KubeletHealthz() + "/healthz"
	return p.ready(ctx, func(ctx context.Context) error { return httpOK(ctx, n.bed.plain, url) })
}

// StopKubelet sends sig to kubelet and waits for its end. Its pods run on.
func (n *Node) StopKubelet(ctx context.Context, sig syscall.Signal) error {
	return n.bed.stop(ctx, n.name("kubelet"), sig)
}

// RestartKubelet is StopKubelet with SIGTERM and StartKubelet.
func (n *Node) RestartKubelet(ctx context.Context) error {
	if err := n.StopKubelet(ctx, syscall.SIGTERM); err != nil {
		return err
	}
	return n.StartKubelet(ctx)
}

// DialCRI returns a connection to the socket that kubelet dials. The caller closes it.
func (n *Node) DialCRI() (*grpc.ClientConn, error) { return dialCRI(n.CRISocket) }

// DialRuntime returns a connection to containerd itself. The caller closes it.
func (n *Node) DialRuntime() (*grpc.ClientConn, error) { return dialCRI(n.RuntimeSocket) }

// removePodsTimeout bounds the orderly part of a bed's removal; what is left goes by force.
const removePodsTimeout = 20 * time.Second

// criMessageSize is what kubelet allows (pkg/kubelet/cri remote: maxMsgSize).
const criMessageSize = 16 << 20

func dialCRI(socket string) (*grpc.ClientConn, error) {
	return grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(criMessageSize), grpc.MaxCallSendMsgSize(criMessageSize)))
}

// criAnswers is nil when the runtime behind socket answers and its pod network is up.
func criAnswers(ctx context.Context, socket string) error {
	conn, err := dialCRI(socket)
	if err != nil {
		return err
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	resp, err := runtimeapi.NewRuntimeServiceClient(conn).Status(ctx, &runtimeapi.StatusRequest{})
	if err != nil {
		return err
	}
	for _, c := range resp.GetStatus().GetConditions() {
		if (c.Type == runtimeapi.RuntimeReady || c.Type == runtimeapi.NetworkReady) && !c.Status {
			return fmt.Errorf("%s is false: %s %s", c.Type, c.Reason, c.Message)
		}
	}
	return nil
}

// removePods stops and removes all pods of the containerd at socket, so that CNI, cgroups and
// mounts are undone by those who made them.
func removePods(ctx context.Context, socket string) error {
	conn, err := dialCRI(socket)
	if err != nil {
		return err
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(ctx, removePodsTimeout)
	defer cancel()
	rt := runtimeapi.NewRuntimeServiceClient(conn)
	list, err := rt.ListPodSandbox(ctx, &runtimeapi.ListPodSandboxRequest{})
	if err != nil {
		return err
	}
	errs := make([]error, len(list.Items))
	var wg sync.WaitGroup
	slots := make(chan struct{}, 8) // more do not go faster on the few CPUs of a test machine
	for i, s := range list.Items {
		wg.Go(func() {
			slots <- struct{}{}
			defer func() { <-slots }()
			if _, err := rt.StopPodSandbox(ctx, &runtimeapi.StopPodSandboxRequest{PodSandboxId: s.Id}); err != nil {
				errs[i] = err
				return
			}
			_, errs[i] = rt.RemovePodSandbox(ctx, &runtimeapi.RemovePodSandboxRequest{PodSandboxId: s.Id})
		})
	}
	wg.Wait()
	return errors.Join(errs...)
}

func writeJSON(path string, v any) error {
	b, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(path, b, 0o644)
}
