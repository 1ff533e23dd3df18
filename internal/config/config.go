// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package config

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"math"
	"os"
	"strconv"
	"time"

	"github.com/spf13/pflag"
	"go.yaml.in/yaml/v3"

	"github.com/cri-proxy/cri-proxy/api/identity"
)

// Config is everything `cri-proxy serve` can be told. The yaml tags are the keys
// of the file.
type Config struct {
	// Listen is the CRI socket for kubelet.
	Listen Listen `yaml:"listen"`
	// RuntimeEndpoint is the container runtime's CRI socket, a path or unix:// URL.
	RuntimeEndpoint string `yaml:"runtimeEndpoint"`
	// StateDir holds the journal of operations and the recorded containers. It
	// must survive a restart of the proxy, and should survive a reboot.
	StateDir string `yaml:"stateDir"`
	// AdminSocket is the path of the ops API for root; `cri-proxy ctl` uses it.
	AdminSocket string `yaml:"adminSocket"`
	// Log says what is logged and how. It goes to standard error.
	Log Log `yaml:"log"`
	// MetricsAddress is host:port for /metrics, /healthz and /readyz. Empty: off.
	MetricsAddress string `yaml:"metricsAddress"`
	// NodeName is the Kubernetes name of this node. Default: the host name in
	// lower case, as kubelet does.
	NodeName string `yaml:"nodeName"`
	// Ops is the ops API over TCP, for the controller.
	Ops Ops `yaml:"ops"`
	// Restart says how containers are restarted.
	Restart Restart `yaml:"restart"`
	// Images says how images are pre-pulled.
	Images Images `yaml:"images"`
	// Kubelet says where kubelet is asked.
	Kubelet Kubelet `yaml:"kubelet"`
	// Tracing says where spans are sent.
	Tracing Tracing `yaml:"tracing"`
	// DrainTimeout bounds the wait for calls in flight at shutdown. The longest
	// of them are image pulls.
	DrainTimeout time.Duration `yaml:"drainTimeout"`
	// TakeoverDrainTimeout bounds the calls that a process still answers after another one has
	// taken over: image pulls, and stops with a long grace period. The file may also call it
	// takeoverDrainTimeout. This release writes the old key, because the release before it, which
	// self-update --back starts on the same file, knows no other.
	TakeoverDrainTimeout time.Duration `yaml:"upgradeDrainTimeout"`

	// RecordCalls is a file that gets a JSON line for every CRI call. It is a
	// flag only: what tests and a person with a question use does not belong in a file
	// that stays.
	RecordCalls string `yaml:"-"`

	// File is the file that Load has read, and FileSHA256 the hex digest of its content. Empty:
	// none.
	File       string `yaml:"-"`
	FileSHA256 string `yaml:"-"`
}

// Listen is the CRI socket for kubelet.
type Listen struct {
	// Path of the socket, at most 107 bytes.
	Path string `yaml:"path"`
	// Mode of the socket in octal, such as "0600".
	Mode Mode `yaml:"mode"`
	// Owner and Group of the socket, names or numbers. Empty: those of the process.
	Owner string `yaml:"owner"`
	Group string `yaml:"group"`
}

// Log says what is logged and how.
type Log struct {
	// Level is one of trace, debug, info, warning, error.
	Level string `yaml:"level"`
	// Format is text or json.
	Format string `yaml:"format"`
}

// Ops is the ops API over TCP with mutual TLS. The node's certificate comes either from files,
// which are read again when they change, or from the cluster's controller (Enrol).
type Ops struct {
	// Address is host:port. Empty: off.
	Address string `yaml:"address"`
	// Enrol says how the node gets its certificate from the controller.
	Enrol Enrol `yaml:"enrol"`
	// CertFile and KeyFile are the PEM server certificate and its key.
	CertFile string `yaml:"certFile"`
	KeyFile  string `yaml:"keyFile"`
	// ClientCAFile holds the PEM certificates of who may sign client certificates.
	ClientCAFile string `yaml:"clientCAFile"`
	// AllowedClients are the names, one of which a client certificate must carry as DNS or URI
	// subject alternative name, or as common name. Empty with Enrol: the controller's.
	AllowedClients []string `yaml:"allowedClients"`
}

// Enrol says how the node gets its certificate from the controller, by a CertificateSigningRequest.
type Enrol struct {
	// Kubeconfig is kubelet's, or another one of the user system:node:NAME. Empty: the certificate
	// comes from files.
	Kubeconfig string `yaml:"kubeconfig"`
	// Namespace is the controller's, where it publishes its CA.
	Namespace string `yaml:"namespace"`
}

// Restart says how containers are restarted.
type Restart struct {
	// Method is the fastest method that may switch over to a new container: gate, pidfd or plain.
	// Where it does not work, the next slower method is used.
	Method string `yaml:"method"`
	// CDISpecDir is the directory that the runtime reads CDI specs from, for method gate.
	// Empty: the last one in the runtime's own list.
	CDISpecDir string `yaml:"cdiSpecDir"`
}

// Images says how images are pre-pulled.
type Images struct {
	// Parallel is the maximum number of pre-pulls at a time.
	Parallel int `yaml:"parallel"`
	// BytesPerSecond is the speed limit of pre-pulls that set none. 0: no limit.
	BytesPerSecond int64 `yaml:"bytesPerSecond"`
	// MaxDiskPercent is how full a pre-pull may make the image file system. 0: no check.
	MaxDiskPercent DiskPercent `yaml:"maxDiskPercent"`
	// VerifyAccess makes kubelet itself pull an image that was pre-pulled with secrets, before
	// kubelet sees that the node has the image. kubelet then asks the registry with the credentials
	// of the pod that wants the image, fetches nothing, and remembers whose credentials they were.
	VerifyAccess bool `yaml:"verifyAccess"`
	// RegistryHostsDir has directories with hosts.toml files, separated by colons, instead of
	// config_path and mirrors of containerd's configuration. Empty: containerd's configuration
	// counts.
	RegistryHostsDir string `yaml:"registryHostsDir"`
	// CredentialProviderConfig is kubelet's file of credential provider plugins, or a directory of
	// such files. Empty: none.
	CredentialProviderConfig string `yaml:"credentialProviderConfig"`
	// CredentialProviderBinDir holds the plugins.
	CredentialProviderBinDir string `yaml:"credentialProviderBinDir"`
}

// Kubelet says where kubelet is asked.
type Kubelet struct {
	// PodsSocket is the socket of kubelet's Pods API, which tells an image update whether a pod is
	// going away. Where there is none, kubelet's next call tells it. Empty: do not ask.
	PodsSocket string `yaml:"podsSocket"`
}

// Tracing says where spans are sent, with kubelet's names for it.
type Tracing struct {
	// Endpoint is host:port of an OpenTelemetry collector that takes OTLP over gRPC without TLS, as
	// kubelet's does. Empty: off.
	Endpoint string `yaml:"endpoint"`
	// SamplingRatePerMillion is how many of a million traces are sampled that start in cri-proxy.
	// Traces that kubelet starts follow kubelet's decision.
	SamplingRatePerMillion int `yaml:"samplingRatePerMillion"`
}

// DiskPercent is a percentage of a file system, or [LikeKubelet].
type DiskPercent float64

// LikeKubelet stands for kubelet's imageGCHighThresholdPercent, at which kubelet begins to remove
// images. It is written "kubelet".
const LikeKubelet DiskPercent = -1

const likeKubelet = "kubelet"

// String returns the number, or "kubelet".
func (d DiskPercent) String() string {
	if d == LikeKubelet {
		return likeKubelet
	}
	return strconv.FormatFloat(float64(d), 'g', -1, 64)
}

// Set parses what String returns. It implements [pflag.Value].
func (d *DiskPercent) Set(s string) error {
	if s == likeKubelet {
		*d = LikeKubelet
		return nil
	}
	f, err := strconv.ParseFloat(s, 64)
	if err != nil || math.IsNaN(f) || math.IsInf(f, 0) {
		return fmt.Errorf("want a number, or %s, got %q", likeKubelet, s)
	}
	*d = DiskPercent(f)
	return nil
}

// Type implements [pflag.Value].
func (*DiskPercent) Type() string { return "percent" }

// MarshalYAML writes what Set takes.
func (d DiskPercent) MarshalYAML() (any, error) {
	if d == LikeKubelet {
		return likeKubelet, nil
	}
	return float64(d), nil
}

// RenamedKeys has the new name of each key of the file that [Config.YAML] still writes by its old
// name. [Parse] takes both.
func RenamedKeys() map[string]string {
	return map[string]string{"upgradeDrainTimeout": "takeoverDrainTimeout"}
}

// Mode is a file mode written in octal.
type Mode os.FileMode

// String returns the mode as four octal digits.
func (m Mode) String() string { return fmt.Sprintf("%04o", uint32(m)) }

// Set parses octal digits. It implements [pflag.Value].
func (m *Mode) Set(s string) error {
	var v uint32
	if len(s) < 3 || len(s) > 4 {
		return fmt.Errorf("mode %q: want octal digits such as 0600", s)
	}
	for _, c := range []byte(s) {
		if c < '0' || c > '7' {
			return fmt.Errorf("mode %q: want octal digits such as 0600", s)
		}
		v = v<<3 | uint32(c-'0')
	}
	if v > 0o777 {
		return fmt.Errorf("mode %s: a socket takes permission bits only, at most 0777", s)
	}
	*m = Mode(v)
	return nil
}

// Type implements [pflag.Value].
func (*Mode) Type() string { return "octal" }

// MarshalYAML writes the mode as a quoted string: a bare 0600 is a decimal number
// to some YAML readers.
func (m Mode) MarshalYAML() (any, error) {
	return &yaml.Node{Kind: yaml.ScalarNode, Tag: "!!str", Value: m.String(), Style: yaml.DoubleQuotedStyle}, nil
}

// Default returns the configuration of a node where nothing is said. NodeName is
// left empty: see [Config.Complete].
func Default() *Config {
	return &Config{
		Listen:          Listen{Path: "/run/cri-proxy/cri.sock", Mode: 0o600},
		RuntimeEndpoint: "unix:///run/containerd/containerd.sock",
		StateDir:        "/var/lib/cri-proxy",
		AdminSocket:     DefaultAdminSocket,
		Log:             Log{Level: "info", Format: "text"},
		Ops:             Ops{Enrol: Enrol{Namespace: identity.DefaultNamespace}},
		Restart:         Restart{Method: "gate"},
		Images:          Images{Parallel: 1, MaxDiskPercent: LikeKubelet, VerifyAccess: true},
		Kubelet:         Kubelet{PodsSocket: "/var/lib/kubelet/pods-api/pods-api.sock"},
		DrainTimeout:    defaultDrain,

		TakeoverDrainTimeout: 30 * time.Minute,
	}
}

// defaultDrain is as long as kubelet can go without the runtime unnoticed: while a
// single instance drains, kubelet cannot connect, and after 30 s (maxWaitForContainerRuntime in
// pkg/kubelet/kubelet.go) it reports the node as not ready.
const defaultDrain = 20 * time.Second

// DefaultAdminSocket is where the ops API for root listens.
const DefaultAdminSocket = "/run/cri-proxy/admin.sock"

// DefaultFile is where the units have the configuration.
const DefaultFile = "/etc/cri-proxy/config.yaml"

// Flags registers a flag for every setting. They write into c.
func (c *Config) Flags(fs *pflag.FlagSet) {
	fs.StringVar(&c.Listen.Path, "listen", c.Listen.Path, "CRI socket for kubelet")
	fs.Var(&c.Listen.Mode, "listen-mode", "file mode of the CRI socket")
	fs.StringVar(&c.Listen.Owner, "listen-owner", c.Listen.Owner,
		"owner of the CRI socket, a name or a number (default: the user of the daemon)")
	fs.StringVar(&c.Listen.Group, "listen-group", c.Listen.Group,
		"group of the CRI socket, a name or a number (default: the group of the daemon)")
	fs.StringVar(&c.RuntimeEndpoint, "runtime-endpoint", c.RuntimeEndpoint, "CRI socket of the container runtime")
	fs.StringVar(&c.StateDir, "state-dir", c.StateDir, "directory of the journal and of the recorded containers")
	fs.StringVar(&c.AdminSocket, "admin-socket", c.AdminSocket, "Unix socket of the ops API, for root only")
	fs.StringVar(&c.Log.Level, "log-level", c.Log.Level, "log level: trace, debug, info, warning or error")
	fs.StringVar(&c.Log.Format, "log-format", c.Log.Format, "log format: text or json")
	fs.StringVar(&c.MetricsAddress, "metrics-address", c.MetricsAddress, "host:port for /metrics, "+
		"/healthz and /readyz (default: off)")
	fs.StringVar(&c.NodeName, "node-name", c.NodeName, "Kubernetes name of this node (default: the host name)")
	fs.StringVar(&c.Ops.Address, "ops-address", c.Ops.Address,
		"host:port on which the ops API listens with mutual TLS (default: off)")
	fs.StringVar(&c.Ops.Enrol.Kubeconfig, "ops-enrol-kubeconfig", c.Ops.Enrol.Kubeconfig,
		"kubelet's kubeconfig: request the server certificate from cri-controller with it, instead of using files")
	fs.StringVar(&c.Ops.Enrol.Namespace, "ops-enrol-namespace", c.Ops.Enrol.Namespace,
		"namespace of cri-controller, where it publishes its CA")
	fs.StringVar(&c.Ops.CertFile, "ops-cert-file", c.Ops.CertFile, "PEM file with the server certificate of "+
		"the ops API")
	fs.StringVar(&c.Ops.KeyFile, "ops-key-file", c.Ops.KeyFile, "PEM file with the key of the server certificate")
	fs.StringVar(&c.Ops.ClientCAFile, "ops-client-ca-file", c.Ops.ClientCAFile,
		"PEM file with the CAs that may sign client certificates")
	fs.StringSliceVar(&c.Ops.AllowedClients, "ops-allowed-clients", c.Ops.AllowedClients,
		"names of clients that may send commands, as their certificates carry them")
	fs.StringVar(&c.Restart.Method, "restart-method", c.Restart.Method,
		"fastest method that may switch over to a new container: gate, pidfd or plain")
	fs.StringVar(&c.Restart.CDISpecDir, "cdi-spec-dir", c.Restart.CDISpecDir,
		"directory from which the runtime reads CDI specs (default: ask the runtime)")
	fs.IntVar(&c.Images.Parallel, "images-parallel", c.Images.Parallel, "maximum number of pre-pulls at a time")
	fs.Int64Var(&c.Images.BytesPerSecond, "images-bytes-per-second", c.Images.BytesPerSecond,
		"speed limit of pre-pulls that set none (default: no limit)")
	fs.Var(&c.Images.MaxDiskPercent, "images-max-disk-percent",
		"how full a pre-pull may make the image file system: a percentage, 0 for no check, "+
			"or \"kubelet\" for kubelet's imageGCHighThresholdPercent")
	fs.BoolVar(&c.Images.VerifyAccess, "images-verify-access", c.Images.VerifyAccess,
		"before a pod may use an image that was pre-pulled with secrets, "+
			"make kubelet ask the registry with the pod's credentials")
	fs.StringVar(&c.Images.RegistryHostsDir, "registry-hosts-dir", c.Images.RegistryHostsDir,
		"colon-separated directories with hosts.toml files, "+
			"instead of config_path and mirrors of containerd's configuration")
	fs.StringVar(&c.Images.CredentialProviderConfig,
		"image-credential-provider-config", c.Images.CredentialProviderConfig,
		"configuration of credential provider plugins, a file or a directory, "+
			"as in kubelet's flag of this name (default: none)")
	fs.StringVar(&c.Images.CredentialProviderBinDir,
		"image-credential-provider-bin-dir", c.Images.CredentialProviderBinDir,
		"directory with the credential provider plugins")
	fs.StringVar(&c.Kubelet.PodsSocket, "kubelet-pods-socket", c.Kubelet.PodsSocket,
		"socket of kubelet's Pods API, used where it exists: during image updates, "+
			"and when kubelet stops a container during a restart")
	fs.StringVar(&c.Tracing.Endpoint, "tracing-endpoint", c.Tracing.Endpoint,
		"host:port of an OpenTelemetry collector, OTLP over gRPC without TLS (default: off)")
	fs.IntVar(&c.Tracing.SamplingRatePerMillion, "tracing-sampling-rate-per-million", c.Tracing.SamplingRatePerMillion,
		"how many of a million traces to sample that start in cri-proxy; "+
			"traces that kubelet starts follow kubelet's decision")
	fs.DurationVar(&c.DrainTimeout, "drain-timeout", c.DrainTimeout, "maximum wait for calls in flight at shutdown")
	fs.DurationVar(&c.TakeoverDrainTimeout, "takeover-drain-timeout", c.TakeoverDrainTimeout,
		"maximum wait for calls in flight after a takeover by another process")
	RenamedFlag(fs, "upgrade-drain-timeout", "takeover-drain-timeout")
	fs.StringVar(&c.RecordCalls, "record-calls", c.RecordCalls, "for debugging: write a JSON line for every CRI "+
		"call to this file")
}

// Load reads file into c, which fs writes into, and then applies the flags given
// on the command line again, so that they win. An empty file name reads nothing.
//
// The error names every unknown key and wrong value with file:line:column.
func (c *Config) Load(file string, fs *pflag.FlagSet) error {
	if file == "" {
		return nil
	}
	b, err := os.ReadFile(file)
	if err != nil {
		return &InvalidError{fmt.Errorf("configuration: %w", err)}
	}
	sum := sha256.Sum256(b)
	c.File, c.FileSHA256 = file, hex.EncodeToString(sum[:])
	given := GivenIn(fs)
	if err := Parse(file, b, c); err != nil {
		return &InvalidError{err}
	}
	return given.Apply()
}

// YAML returns the configuration as a file that Load accepts.
func (c *Config) YAML() ([]byte, error) {
	var b bytes.Buffer
	e := yaml.NewEncoder(&b)
	e.SetIndent(2)
	if err := e.Encode(c); err != nil {
		return nil, fmt.Errorf("configuration as yaml: %w", err)
	}
	return b.Bytes(), nil
}
