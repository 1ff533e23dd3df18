// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package install

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cri-proxy/cri-proxy/ops/process"
	"github.com/cri-proxy/cri-proxy/systemd/node/bypass"
	"github.com/cri-proxy/cri-proxy/systemd/node/install/record"
	"github.com/cri-proxy/cri-proxy/systemd/node/kubelet"
	"github.com/cri-proxy/cri-proxy/systemd/node/update"
)

const (
	// oldestKubelet speaks CRI v1 and nothing else; oldestTested is the oldest that restarts are
	// known to work with.
	oldestKubelet, oldestTested = 26, 29
	// oldestContainerd is 1.7, the first with CRI v1 for sandboxes as kubelet uses it.
	oldestContainerd = 7
	// freeBytes is for the binary twice, and the journal.
	freeBytes = 256 << 20
)

// checkMachine checks what everything else needs: root and systemd.
func checkMachine() error {
	if os.Geteuid() != 0 {
		return errors.New("this needs root: run it with sudo")
	}
	if _, err := os.Stat("/run/systemd/system"); err != nil {
		return errors.New("this machine does not run systemd, which keeps the proxy's sockets: " +
			"see docs/OPERATIONS.md for what to do without")
	}
	return nil
}

// runtimeVersion asks the runtime who it is.
func runtimeVersion(ctx context.Context, socket string) (*runtimeapi.VersionResponse, error) {
	conn, err := bypass.Dial(socket)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	return runtimeapi.NewRuntimeServiceClient(conn).Version(ctx, &runtimeapi.VersionRequest{})
}

// checkRuntime makes sure that the runtime answers and is one that restarts work with.
func checkRuntime(ctx context.Context, socket string) (warnings []string, err error) {
	v, err := runtimeVersion(ctx, socket)
	if err != nil {
		return nil, fmt.Errorf("the runtime does not answer on %s: %w; start it, "+
			"or give --runtime-endpoint", socket, err)
	}
	name, version := v.GetRuntimeName(), v.GetRuntimeVersion()
	if name != "containerd" {
		return nil, fmt.Errorf("the runtime on %s is %s %s, "+
			"cri-proxy supports containerd 1.7 and 2", socket, name, version)
	}
	major, minor, ok := numbers(version)
	switch {
	case !ok:
		warnings = append(warnings, fmt.Sprintf("containerd says it is version %q, which cannot be read", version))
	case major == 1 && minor < oldestContainerd || major < 1:
		return nil, fmt.Errorf("containerd is %s, cri-proxy supports 1.7 and 2: upgrade it first", version)
	}
	if why := cdi(ctx, socket); why != "" {
		warnings = append(warnings, why+": the gap in a restart is about 60 ms and not 6")
	}
	return warnings, nil
}

// cdi says why the runtime does not take CDI devices, empty if it does.
func cdi(ctx context.Context, socket string) string {
	conn, err := bypass.Dial(socket)
	if err != nil {
		return err.Error()
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	st, err := runtimeapi.NewRuntimeServiceClient(conn).Status(ctx, &runtimeapi.StatusRequest{Verbose: true})
	if err != nil {
		return err.Error()
	}
	var config struct {
		EnableCDI   *bool    `json:"enableCDI"`
		CDISpecDirs []string `json:"cdiSpecDirs"`
	}
	if err := json.Unmarshal([]byte(st.GetInfo()["config"]), &config); err != nil {
		return "containerd does not tell whether CDI is on"
	}
	if config.EnableCDI != nil && !*config.EnableCDI || len(config.CDISpecDirs) == 0 {
		return "CDI is off in containerd (enable_cdi, cdi_spec_dirs)"
	}
	return ""
}

// numbers are the first two of a version such as v1.37.2 or 2.4.2+unknown.
func numbers(version string) (major, minor int, ok bool) {
	parts := strings.SplitN(strings.TrimPrefix(version, "v"), ".", 3)
	if len(parts) < 2 {
		return 0, 0, false
	}
	major, err := strconv.Atoi(parts[0])
	if err != nil {
		return 0, 0, false
	}
	digits := strings.IndexFunc(parts[1], func(r rune) bool { return r < '0' || r > '9' })
	if digits < 0 {
		digits = len(parts[1])
	}
	minor, err = strconv.Atoi(parts[1][:digits])
	return major, minor, err == nil
}

func checkKubelet(ctx context.Context, k *kubelet.Kubelet) (version string, warnings []string, err error) {
	version, err = k.Version(ctx)
	if err != nil {
		return "", []string{err.Error()}, nil
	}
	major, minor, ok := numbers(version)
	switch {
	case !ok:
		warnings = append(warnings, fmt.Sprintf("kubelet says it is version %q, which cannot be read", version))
	case major == 1 && minor < oldestKubelet:
		return version, nil, fmt.Errorf("kubelet is %s, cri-proxy needs 1.%d, which speaks CRI v1: upgrade it first",
			version, oldestKubelet)
	case major == 1 && minor < oldestTested:
		warnings = append(warnings, fmt.Sprintf("kubelet is %s, cri-proxy is tested with 1.%d and later",
			version, oldestTested))
	}
	return version, warnings, nil
}

// checkSpace makes sure that there is room for what is installed, and that programs run from there.
func checkSpace(prefix update.Prefix) error {
	for _, dir := range []string{prefix.LibDir(), filepath.Dir(record.Dir)} {
		at := dir
		for {
			if _, err := os.Stat(at); err == nil {
				break
			}
			at = filepath.Dir(at)
		}
		var st unix.Statfs_t
		if err := unix.Statfs(at, &st); err != nil {
			return fmt.Errorf("%s: %w", at, err)
		}
		if st.Flags&unix.ST_RDONLY != 0 {
			if dir == prefix.LibDir() {
				return fmt.Errorf("%s is on a file system that is read-only: give another place with --prefix, "+
					"such as /opt", dir)
			}
			return fmt.Errorf("%s is on a file system that is read-only", dir)
		}
		if st.Flags&unix.ST_NOEXEC != 0 && dir == prefix.LibDir() {
			return fmt.Errorf("%s is on a file system that no programs run from (noexec): "+
				"give another place with --prefix, such as /opt", dir)
		}
		if free := st.Bavail * uint64(st.Bsize); free < freeBytes {
			return fmt.Errorf("%s has %d MiB free, %d are needed", at, free>>20, freeBytes>>20)
		}
	}
	return nil
}

// listener returns the process that listens on a socket. pid is 0 if it is not visible from here.
func listener(ctx context.Context, socket string) (pid int, name string, err error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	p, err := process.Listener(ctx, "/proc", socket)
	if errors.Is(err, process.ErrForeign) {
		return 0, "", nil
	}
	if err != nil {
		return 0, "", err
	}
	return p.PID, p.Name("/proc"), nil
}

// checkAlone makes sure that nobody else is between kubelet and the runtime: we would take that
// process out of the path, or come to stand behind it.
func checkAlone(ctx context.Context, kubelets, runtime string) error {
	pid, name, err := listener(ctx, runtime)
	if err != nil {
		return fmt.Errorf("the runtime's socket %s: %w", runtime, err)
	}
	if pid > 1 && !strings.HasPrefix(name, "containerd") {
		return fmt.Errorf("%s is served by %s (process %d) and not by containerd: "+
			"give the runtime's own socket with --runtime-endpoint, or take that proxy away first", runtime, name, pid)
	}
	if kubelets == "" || kubelets == runtime {
		return nil
	}
	other, name, err := listener(ctx, kubelets)
	if err == nil && other != pid {
		return fmt.Errorf("kubelet goes to the runtime through %s, served by %s (process %d): "+
			"cri-proxy would take it out of the path; take it away first, or use --force", kubelets, name, other)
	}
	return nil
}
