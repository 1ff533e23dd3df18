// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package doctor

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/internal/bypassstate"
	"github.com/cri-proxy/cri-proxy/internal/config"
	"github.com/cri-proxy/cri-proxy/internal/version"
	"github.com/cri-proxy/cri-proxy/systemd/node/bypass"
	"github.com/cri-proxy/cri-proxy/systemd/node/kubelet"
)

// callTimeout bounds each call: everything is on this machine.
const callTimeout = 5 * time.Second

// Options say what to examine. The zero value of all but Now stands for the node as it is.
type Options struct {
	// ConfigFile is the configuration file of the daemon. Empty: [config.DefaultFile].
	ConfigFile string
	// AdminSocket, if not empty, replaces the one in the configuration.
	AdminSocket string
	// Proc is where procfs is mounted; empty: /proc.
	Proc string
	// Systemd is the directory that exists if systemd runs, sd_booted(3). Empty:
	// /run/systemd/system.
	Systemd string
	// CRI is the version of the CRI that this binary knows, such as v0.37.2. Empty: the version of
	// k8s.io/cri-api that it links.
	CRI string
	Now func() time.Time
}

// examination is one look at the node.
type examination struct {
	report
	o             Options
	config        *config.Config
	runtimeSocket string
	link          string // that kubelet is to dial
	past          bool   // kubelet is led past the proxy
	info          *opsv1.NodeInfoResponse
	high          float64 // kubelet's imageGCHighThresholdPercent
}

// Examine looks at the node and returns what it found, in the order from kubelet to the runtime and
// on to the controller.
func Examine(ctx context.Context, o Options) []Finding {
	if o.ConfigFile == "" {
		o.ConfigFile = config.DefaultFile
	}
	if o.Proc == "" {
		o.Proc = "/proc"
	}
	if o.Systemd == "" {
		o.Systemd = "/run/systemd/system"
	}
	if o.CRI == "" {
		o.CRI = linkedCRI()
	}
	x := &examination{o: o, high: kubelet.DefaultImageGCHighThreshold}
	if os.Geteuid() != 0 {
		x.warn("root", "run this as root", "not root: most of what follows cannot be seen")
	}
	x.configuration()
	x.daemon(ctx)
	x.drift()
	x.bypass()
	x.sockets(ctx)
	x.kubelet()
	x.runtime(ctx)
	x.versions(ctx)
	x.methods()
	x.state()
	x.network()
	x.units(ctx)
	return x.findings
}

func (x *examination) exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}

// configuration reads the file. If something is wrong with it, the examination goes on with the
// defaults.
func (x *examination) configuration() {
	const check = "config"
	c := config.Default()
	err := c.Load(x.o.ConfigFile, nil)
	if err == nil {
		err = errors.Join(c.Complete(), c.Validate())
	}
	switch {
	case errors.Is(err, fs.ErrNotExist):
		x.warn(check, "give the daemon's with --config", "%s does not exist, looking at the defaults", x.o.ConfigFile)
		c = config.Default()
		_ = c.Complete()
	case err != nil:
		x.fail(check, "cri-proxy config check "+x.o.ConfigFile,
			"%s; looking at the defaults", strings.ReplaceAll(err.Error(), "\n", "; "))
		c = config.Default()
		_ = c.Complete()
	default:
		x.ok(check, "%s", x.o.ConfigFile)
	}
	x.config = c
	if x.o.AdminSocket != "" {
		c.AdminSocket = x.o.AdminSocket
	}
	x.runtimeSocket, _ = config.SocketPath(c.RuntimeEndpoint) // it is valid
	x.link = filepath.Join(filepath.Dir(c.Listen.Path), "kubelet.sock")
}

// daemon asks the daemon.
func (x *examination) daemon(ctx context.Context) {
	const check = "daemon"
	conn, err := bypass.Dial(x.config.AdminSocket)
	if err != nil {
		x.fail(check, "", "%s: %v", x.config.AdminSocket, err)
		return
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	info, err := opsv1.NewOpsClient(conn).NodeInfo(ctx, &opsv1.NodeInfoRequest{})
	if err != nil {
		x.fail(check, "systemctl start cri-proxy.socket, see journalctl -u "+
			"'cri-proxy@*'", "cri-proxy does not answer on %s: %v", x.config.AdminSocket, plain(err))
		return
	}
	x.info = info
	detail := fmt.Sprintf("version %s, for %s", info.GetVersion(), round(x.o.Now().Sub(info.GetStartTime().AsTime())))
	if info.GetPid() != 0 {
		detail += fmt.Sprintf(", pid %d", info.GetPid())
	}
	if unit := x.unitOf(int(info.GetPid())); unit != "" {
		detail += ", " + unit
	}
	x.ok(check, "%s", detail)
	if mine := version.Short(); mine != info.GetVersion() {
		x.warn("version", "cri-proxy self-update puts this version in its place", "this binary is %s, the "+
			"daemon %s", mine, info.GetVersion())
	}
	if n := info.GetCounters().GetInterceptorFaults(); n > 0 {
		x.warn(check, "see \"interceptor fault\" in journalctl -u 'cri-proxy@*' and "+
			"report it", "%d calls were passed on unchanged because an interceptor could not do its work", n)
	}
	if info.GetNodeName() != x.config.NodeName {
		x.warn("config", "set nodeName", "the daemon takes the node for %s, "+
			"the configuration says %s", info.GetNodeName(), x.config.NodeName)
	}
}

// drift compares the configuration with the one that the daemon has read.
func (x *examination) drift() {
	if x.info.GetConfigSha256() == "" {
		return
	}
	file := x.info.GetConfigFile()
	b, err := os.ReadFile(file)
	if err != nil {
		x.warn("config", "put it back, or the next start of cri-proxy fails", "the daemon has read %s, "+
			"which cannot be read any more: %v", file, err)
		return
	}
	if sum := sha256.Sum256(b); hex.EncodeToString(sum[:]) != x.info.GetConfigSha256() {
		x.warn("config", "put it to use by starting the other instance, "+
			"docs/OPERATIONS.md#upgrade", "%s has changed since the daemon has read it", file)
	}
}

// bypass checks where kubelet is led, and whether that is what was requested.
func (x *examination) bypass() {
	const check = "bypass"
	state := bypassstate.Read(x.config.StateDir)
	past, err := bypass.Past(x.config)
	x.past = past
	switch {
	case errors.Is(err, fs.ErrNotExist):
		x.warn(check, "cri-proxy bypass apply", "%s does not exist: kubelet cannot be led past cri-proxy, "+
			"should that ever be needed", x.link)
	case err != nil:
		x.fail(check, "cri-proxy bypass apply", "%v", err)
	case past && state != nil:
		x.warn(check, "when the cause is gone, cri-proxy bypass off --restart-kubelet", "on, %s", state)
	case past:
		x.fail(check, "cri-proxy bypass apply", "%s leads to the runtime, though nobody has asked for it", x.link)
	case state != nil:
		x.fail(check, "cri-proxy bypass apply", "asked for %s, but %s leads to cri-proxy", state, x.link)
	default:
		x.ok(check, "off")
	}
	crashes := filepath.Join(filepath.Dir(x.config.Listen.Path), "crashes")
	if b, err := os.ReadFile(crashes); err == nil {
		if n := strings.Count(string(b), "\n"); n > 0 {
			x.warn(check, "see journalctl -u 'cri-proxy@*'; cri-proxy bypass off "+
				"forgets them", "cri-proxy has ended %d times since boot without being asked to", n)
		}
	}
}

// sockets checks the files of the sockets, and whether somebody accepts connections.
func (x *examination) sockets(ctx context.Context) {
	const check = "sockets"
	start := "systemctl start cri-proxy.socket cri-proxy-admin.socket"
	before := len(x.findings)
	for _, s := range []struct {
		path string
		mode fs.FileMode
	}{{x.config.Listen.Path, fs.FileMode(x.config.Listen.Mode)}, {x.config.AdminSocket, 0o600}} {
		fi, err := os.Stat(s.path)
		switch {
		case err != nil:
			x.fail(check, start, "%v", err)
		case fi.Mode().Type() != fs.ModeSocket:
			x.fail(check, "remove it, then "+start, "%s is no socket but %s", s.path, fi.Mode())
		case fi.Mode().Perm()&0o007 != 0:
			x.fail(check, fmt.Sprintf("chmod %04o %s, and SocketMode= in the unit", s.mode, s.path),
				"%s has mode %04o: every user of this machine is root through it", s.path, fi.Mode().Perm())
		case fi.Mode().Perm() != s.mode:
			x.warn(check, fmt.Sprintf("chmod %04o %s, and SocketMode= in the unit", s.mode, s.path),
				"%s has mode %04o, the configuration says %04o", s.path, fi.Mode().Perm(), s.mode)
		}
	}
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	if x.exists(x.config.Listen.Path) {
		if err := bypass.Probe(ctx, x.config.Listen.Path); err != nil {
			x.fail(check, "see journalctl -u 'cri-proxy@*'; cri-proxy bypass on lets kubelet work "+
				"meanwhile", "%s does not answer: %v", x.config.Listen.Path, plain(err))
		}
	}
	if len(x.findings) == before {
		x.ok(check, "%s and %s answer", x.config.Listen.Path, x.config.AdminSocket)
	}
}

// leastFree is how much room the file system of the state directory must have: the journal takes a
// few megabytes.
const (
	leastFree  = 16 << 20
	littleFree = 256 << 20
)

// state checks the directory of the journal.
func (x *examination) state() {
	const check = "state"
	dir := x.config.StateDir
	if e := x.info.GetJournalError(); e != "" {
		x.fail(check, "operations are refused until it can be opened", "journal: %s", e)
	}
	fi, err := os.Stat(dir)
	if err != nil {
		x.fail(check, "the daemon makes it when it starts", "%v", err)
		return
	}
	if fi.Mode().Perm()&0o077 != 0 {
		x.fail(check, "chmod 0700 "+dir, "%s has mode %04o: it holds the environment of "+
			"containers", dir, fi.Mode().Perm())
	}
	if err := writable(dir); err != nil {
		x.fail(check, "make room, or mount it writable; operations are refused meanwhile", "%v", err)
		return
	}
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		x.warn(check, "", "%s: %v", dir, err)
		return
	}
	free := st.Bavail * uint64(st.Bsize) //nolint:gosec // a block size is positive
	switch {
	case free < leastFree:
		x.fail(check, "make room", "%s has %d MiB left", dir, free>>20)
	case free < littleFree:
		x.warn(check, "make room", "%s has %d MiB left", dir, free>>20)
	default:
		x.ok(check, "%s is writable, %d MiB are left", dir, free>>20)
	}
}

// writable tries to write a file to the disk.
func writable(dir string) error {
	f, err := os.CreateTemp(dir, ".doctor-*")
	if err != nil {
		return err
	}
	_, err = f.Write(make([]byte, 4096))
	return errors.Join(err, f.Sync(), f.Close(), os.Remove(f.Name()))
}

// same reports whether two paths are the same file, or will be when it is made.
func same(a, b string) bool { return canonical(a) == canonical(b) }

// canonical follows symlinks of the directory, not of the file: kubelet.sock is not cri.sock.
func canonical(path string) string {
	dir, err := filepath.EvalSymlinks(filepath.Dir(path))
	if err != nil {
		return filepath.Clean(path)
	}
	return filepath.Join(dir, filepath.Base(path))
}

func round(d time.Duration) time.Duration {
	if d < time.Minute {
		return d.Round(100 * time.Millisecond)
	}
	return d.Round(time.Second)
}
