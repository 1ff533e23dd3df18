// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package kubelet

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/cri-proxy/cri-proxy/internal/config"
	"github.com/cri-proxy/cri-proxy/internal/yamledit"
)

// DefaultUnit is kubelet's systemd unit nearly everywhere.
const DefaultUnit = "kubelet.service"

// callTimeout bounds a call of systemctl, or of kubelet's binary.
const callTimeout = 10 * time.Second

// ErrNotRunning says that kubelet does not run.
var ErrNotRunning = errors.New("kubelet does not run")

// Kubelet is a running kubelet. Methods read its files when they are called.
type Kubelet struct {
	Unit string
	PID  int
	// Args are its command line without the program.
	Args []string
	// Dir is its working directory, for relative paths.
	Dir string
	// UnitFiles are the unit's own file and its drop-ins, in the order in which systemd applies
	// them.
	UnitFiles []string
	// EnvFiles have variables that the unit's command line may use.
	EnvFiles []string
	// UnitDir is where drop-ins for the unit go.
	UnitDir string
}

// Find looks at the process of a systemd unit. It returns [ErrNotRunning] if there is no such unit,
// or it has no process. As for systemctl, the name may come without .service.
func Find(ctx context.Context, unit string) (*Kubelet, error) {
	if !strings.HasSuffix(unit, ".service") {
		unit += ".service"
	}
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	// Not by package systemctl: EnvironmentFiles comes more than once.
	out, err := exec.CommandContext(ctx, "systemctl", "show", unit,
		"-p", "MainPID,FragmentPath,DropInPaths,EnvironmentFiles").Output()
	if err != nil {
		return nil, fmt.Errorf("systemctl show %s: %w", unit, err)
	}
	k := &Kubelet{Unit: unit, UnitDir: filepath.Join("/etc/systemd/system", unit+".d")}
	for line := range strings.Lines(string(out)) {
		key, value, _ := strings.Cut(strings.TrimSpace(line), "=")
		switch key {
		case "MainPID":
			k.PID, _ = strconv.Atoi(value)
		case "FragmentPath":
			k.UnitFiles = append([]string{value}, k.UnitFiles...)
		case "DropInPaths":
			k.UnitFiles = append(k.UnitFiles, strings.Fields(value)...)
		case "EnvironmentFiles":
			file, _, _ := strings.Cut(value, " (") // FILE (ignore_errors=yes)
			k.EnvFiles = append(k.EnvFiles, file)
		}
	}
	if k.PID == 0 {
		return nil, fmt.Errorf("%w as %s", ErrNotRunning, unit)
	}
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", k.PID))
	if err != nil {
		return nil, fmt.Errorf("%w as %s: %w", ErrNotRunning, unit, err)
	}
	args := strings.Split(strings.TrimSuffix(string(b), "\x00"), "\x00")
	if !strings.HasPrefix(filepath.Base(args[0]), "kubelet") {
		return nil, fmt.Errorf("%w as %s: process %d is %s", ErrNotRunning, unit, k.PID, args[0])
	}
	k.Args = args[1:]
	k.Dir, err = os.Readlink(fmt.Sprintf("/proc/%d/cwd", k.PID))
	return k, err
}

// Version asks the running binary for its version, such as v1.37.2.
func (k *Kubelet) Version(ctx context.Context) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	out, err := exec.CommandContext(ctx, fmt.Sprintf("/proc/%d/exe", k.PID), "--version").Output()
	if err != nil {
		return "", fmt.Errorf("version of kubelet: %w", err)
	}
	return strings.TrimPrefix(strings.TrimSpace(string(out)), "Kubernetes "), nil
}

// Environ is the environment that kubelet was started with. It is nil if that cannot be read.
func (k *Kubelet) Environ() []string {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/environ", k.PID))
	if err != nil || len(b) == 0 {
		return nil
	}
	return strings.Split(strings.TrimSuffix(string(b), "\x00"), "\x00")
}

// Flag returns the value of a flag on the command line. The last one counts.
func (k *Kubelet) Flag(name string) (value string, set bool) {
	for i, arg := range k.Args {
		rest, ok := strings.CutPrefix(arg, "--"+name)
		switch {
		case !ok:
		case strings.HasPrefix(rest, "="):
			value, set = rest[1:], true
		case rest == "" && i+1 < len(k.Args):
			value, set = k.Args[i+1], true
		}
	}
	return value, set
}

// path makes a path absolute, as kubelet does.
func (k *Kubelet) path(p string) string {
	if p == "" || filepath.IsAbs(p) {
		return p
	}
	return filepath.Join(k.Dir, p)
}

func (k *Kubelet) fileFlag(name string) string {
	v, _ := k.Flag(name)
	return k.path(v)
}

// Kubeconfig is kubelet's kubeconfig file, empty for none.
func (k *Kubelet) Kubeconfig() string { return k.fileFlag("kubeconfig") }

// defaultRootDir is kubelet's default.
const defaultRootDir = "/var/lib/kubelet"

// RootDir is where kubelet keeps pods and its state.
func (k *Kubelet) RootDir() string {
	if d := k.fileFlag("root-dir"); d != "" {
		return d
	}
	return defaultRootDir
}

// PodLogsDir is where containers' logs are.
func (k *Kubelet) PodLogsDir() string {
	if s, err := k.setting("pod-logs-dir", "podLogsDir"); err == nil && s.value != "" {
		return s.value
	}
	return "/var/log/pods"
}

// CredentialProviders are the configuration and the directory of kubelet's credential provider
// plugins. Both are empty if there are none.
func (k *Kubelet) CredentialProviders() (file, dir string) {
	file, dir = k.fileFlag("image-credential-provider-config"), k.fileFlag("image-credential-provider-bin-dir")
	if file == "" || dir == "" {
		return "", ""
	}
	return file, dir
}

// NodeName is the name of kubelet's node, unless a cloud provider gives another one.
func (k *Kubelet) NodeName() (string, error) {
	if n, _ := k.Flag("hostname-override"); n != "" {
		return strings.ToLower(strings.TrimSpace(n)), nil
	}
	n, err := os.Hostname()
	return strings.ToLower(n), err
}

// HealthzAddress is host:port of kubelet's health check. It is empty if that is off.
func (k *Kubelet) HealthzAddress() string {
	port, host := "10248", "127.0.0.1"
	if s, err := k.setting("healthz-port", "healthzPort"); err == nil && s.value != "" {
		port = s.value
	}
	if s, err := k.setting("healthz-bind-address", "healthzBindAddress"); err == nil && s.value != "" {
		host = s.value
	}
	if port == "0" {
		return ""
	}
	switch host {
	case "0.0.0.0":
		host = "127.0.0.1"
	case "::":
		host = "::1"
	}
	return net.JoinHostPort(host, port)
}

// The places from which a setting comes. A later one overrides an earlier one.
type where int

const (
	byDefault where = iota
	inConfig
	inDropIn // of --config-dir
	onCommandLine
)

type setting struct {
	value string
	where where
	file  string // for inConfig and inDropIn
}

// setting returns the effective value: that of the flag, else of the last file of --config-dir that
// has it, else of --config (mergeKubeletConfigurations in cmd/kubelet/app/server.go).
func (k *Kubelet) setting(flag, field string) (setting, error) {
	if v, ok := k.Flag(flag); ok && flag != "" {
		return setting{value: v, where: onCommandLine}, nil
	}
	s := setting{}
	files, err := k.dropIns()
	if err != nil {
		return s, err
	}
	if c := k.fileFlag("config"); c != "" {
		files = append([]string{c}, files...)
	}
	for i, file := range files {
		b, err := os.ReadFile(file)
		if err != nil {
			return s, fmt.Errorf("configuration of kubelet: %w", err)
		}
		v, err := yamledit.Get(b, field)
		if err != nil {
			return s, fmt.Errorf("configuration of kubelet: %s: %w", file, err)
		}
		if v == nil || v == "" {
			continue
		}
		s = setting{value: fmt.Sprint(v), where: inDropIn, file: file}
		if i == 0 && k.fileFlag("config") != "" {
			s.where = inConfig
		}
	}
	return s, nil
}

// dropIns are the files of --config-dir, in the order in which kubelet applies them.
func (k *Kubelet) dropIns() (files []string, err error) {
	dir := k.fileFlag("config-dir")
	if dir == "" {
		return nil, nil
	}
	err = filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err == nil && !d.IsDir() && filepath.Ext(path) == ".conf" {
			files = append(files, path)
		}
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("configuration of kubelet: %w", err)
	}
	return files, nil
}

// defaultEndpoint is kubelet's default.
const defaultEndpoint = "unix:///run/containerd/containerd.sock"

// endpoints has the two settings, each as flag and as field.
var endpoints = struct{ runtime, image [2]string }{
	runtime: [2]string{"container-runtime-endpoint", "containerRuntimeEndpoint"},
	image:   [2]string{"image-service-endpoint", "imageServiceEndpoint"},
}

// defaultCredentialsVerification is the default since Kubernetes 1.35. Older kubelets verify
// nothing.
const defaultCredentialsVerification = "NeverVerifyPreloadedImages"

// DefaultImageGCHighThreshold is kubelet's default.
const DefaultImageGCHighThreshold = 85

// ImageGCHighThreshold is how full, in percent, the image file system may become before kubelet
// removes images.
func (k *Kubelet) ImageGCHighThreshold() (int, error) {
	s, err := k.setting("image-gc-high-threshold", "imageGCHighThresholdPercent")
	if err != nil {
		return 0, err
	}
	if s.value == "" {
		return DefaultImageGCHighThreshold, nil
	}
	n, err := strconv.Atoi(s.value)
	if err != nil || n < 0 || n > 100 {
		return 0, fmt.Errorf("configuration of kubelet: imageGCHighThresholdPercent is %q", s.value)
	}
	return n, nil
}

// CredentialsVerification is kubelet's policy for images that are on the node: whether a pod may
// use one without proof that it could pull it.
func (k *Kubelet) CredentialsVerification() (string, error) {
	s, err := k.setting("", "imagePullCredentialsVerificationPolicy") // there is no flag
	if err == nil && s.value == "" {
		s.value = defaultCredentialsVerification
	}
	return s.value, err
}

// Endpoint is the runtime endpoint that kubelet would take from the current files.
func (k *Kubelet) Endpoint() (string, error) {
	s, err := k.setting(endpoints.runtime[0], endpoints.runtime[1])
	if err == nil && s.value == "" {
		s.value = defaultEndpoint
	}
	return s.value, err
}

// Dials reports whether kubelet dials this socket for containers, or for images.
func (k *Kubelet) Dials(socket string) (containers, images bool, err error) {
	endpoint, err := k.Endpoint()
	if err != nil {
		return false, false, err
	}
	containers = same(endpoint, socket)
	image, err := k.setting(endpoints.image[0], endpoints.image[1])
	if image.value == "" {
		return containers, containers, err
	}
	return containers, same(image.value, socket), err
}

// same reports whether both endpoints name one path.
func same(a, b string) bool {
	pa, err := config.SocketPath(a)
	if err != nil {
		return a == b
	}
	pb, err := config.SocketPath(b)
	return err == nil && clean(pa) == clean(pb)
}

// clean resolves /var/run, which is a symlink on every machine with systemd.
func clean(p string) string {
	if rest, ok := strings.CutPrefix(p, "/var/run/"); ok {
		return "/run/" + rest
	}
	return p
}
