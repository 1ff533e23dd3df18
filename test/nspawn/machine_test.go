// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package nspawn

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cri-proxy/cri-proxy/test/testbed"
)

const (
	suite    = "bookworm"
	packages = "systemd-sysv,dbus"
	// buildTimeout is for debootstrap over a slow line, and the Go compiler.
	buildTimeout = 15 * time.Minute
	// soon bounds what takes seconds at the most, on a machine with nothing else to do.
	soon = time.Minute
)

// machine is a system under systemd-nspawn.
type machine struct {
	dir    string   // of this run
	root   string   // of the machine, an overlay over the root that is kept
	shared string   // a directory of both sides, /shared inside
	args   []string // more of systemd-nspawn's
	nspawn *exec.Cmd
	ended  chan struct{}
	log    *bytes.Buffer
}

// base is the root file system that machines are made from.
var base string

func TestMain(m *testing.M) { os.Exit(testMain(m)) }

func testMain(m *testing.M) int {
	if os.Geteuid() != 0 {
		fmt.Fprintln(os.Stderr, "these tests need root")
		return 1
	}
	ctx, cancel := context.WithTimeout(context.Background(), buildTimeout)
	defer cancel()
	var err error
	if base, err = makeRoot(ctx); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return m.Run()
}

// newMachine starts a machine for the test.
func newMachine(t *testing.T) *machine {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), buildTimeout)
	defer cancel()
	m, err := makeMachine(ctx)
	if err == nil {
		err = m.installStandins(ctx)
	}
	if err == nil {
		err = m.boot(ctx)
	}
	if m != nil {
		t.Cleanup(m.stop)
	}
	if err != nil {
		t.Fatalf("%v\n%s", err, m.said())
	}
	return m
}

// said is what the machine has said on its console.
func (m *machine) said() string {
	if m == nil {
		return ""
	}
	return m.log.String()
}

// command runs a program and returns an error with what it says.
func command(ctx context.Context, name string, args ...string) error {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Env = append(os.Environ(), "DEBIAN_FRONTEND=noninteractive")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%s %s: %w\n%s", name, strings.Join(args, " "), err, out)
	}
	return nil
}

// makeRoot returns the root file system that is kept, which it makes the first time.
func makeRoot(ctx context.Context) (string, error) {
	for _, tool := range [][2]string{{"debootstrap", "debootstrap"}, {"systemd-nspawn", "systemd-container"}} {
		if _, err := exec.LookPath(tool[0]); err == nil {
			continue
		}
		if err := command(ctx, "apt-get", "update", "-qq"); err != nil {
			return "", err
		}
		if err := command(ctx, "apt-get", "install", "-y", "-qq", "--no-install-recommends", tool[1]); err != nil {
			return "", err
		}
	}
	cache, err := testbed.CacheDir()
	if err != nil {
		return "", err
	}
	dir := filepath.Join(cache, "nspawn")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", err
	}
	lock, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return "", err
	}
	defer lock.Close()
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX); err != nil {
		return "", err
	}
	root := filepath.Join(dir, suite+"-"+strings.ReplaceAll(packages, ",", "-"))
	if _, err := os.Stat(root); err == nil {
		return root, nil
	}
	fmt.Fprintln(os.Stderr, "debootstrap", suite, "...")
	fresh := root + ".new"
	if err := os.RemoveAll(fresh); err != nil {
		return "", err
	}
	if err := command(ctx, "debootstrap", "--variant=minbase", "--include="+packages, suite, fresh); err != nil {
		return "", err
	}
	return root, os.Rename(fresh, root)
}

// the units of the stand-ins, and what makes the machine quick.
const (
	containerdUnit = `[Unit]
Description=stand-in for containerd
[Service]
Type=notify
ExecStart=/usr/local/bin/standin runtime /run/containerd/containerd.sock /shared
[Install]
WantedBy=multi-user.target
`
	kubeletUnit = `[Unit]
Description=stand-in for kubelet
StartLimitIntervalSec=0
[Service]
Type=notify
ExecStart=/usr/local/bin/standin kubelet /run/cri-proxy/kubelet.sock /shared
Restart=always
[Install]
WantedBy=multi-user.target
`
	// quick is a drop-in: the unit's own watchdog takes longer than a test should.
	quick = "[Service]\nWatchdogSec=3s\n"
)

// makeMachine makes the machine's root, with the binaries in /shared.
func makeMachine(ctx context.Context) (m *machine, err error) {
	runs := filepath.Join(filepath.Dir(base), "runs")
	sweep(runs)
	dir := filepath.Join(runs, strconv.Itoa(os.Getpid()))
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	m = &machine{dir: dir, root: filepath.Join(dir, "root"), shared: filepath.Join(dir, "shared"), log: &bytes.Buffer{}}
	upper, work := filepath.Join(dir, "upper"), filepath.Join(dir, "work")
	for _, d := range []string{m.root, m.shared, upper, work} {
		if err := os.Mkdir(d, 0o755); err != nil {
			return m, err
		}
	}
	if err := unix.Mount("overlay", m.root, "overlay", 0,
		fmt.Sprintf("lowerdir=%s,upperdir=%s,workdir=%s", base, upper, work)); err != nil {
		return m, fmt.Errorf("overlay of the root: %w", err)
	}
	return m, m.build(ctx)
}

// masked are units that a machine for a test does not need.
var masked = []string{"systemd-networkd.service", "systemd-resolved.service", "systemd-timesyncd.service",
	"apt-daily.timer", "apt-daily-upgrade.timer", "dpkg-db-backup.timer", "fstrim.timer", "e2scrub_all.timer",
	"systemd-logind.service", "getty.target", "console-getty.service"}

// build makes the programs, and versions of them.
func (m *machine) build(ctx context.Context) error {
	build := exec.CommandContext(ctx, "go", "build", "-o", m.shared+"/", "./cmd/cri-proxy", "./test/nspawn/standin")
	build.Dir = "../.."
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		return fmt.Errorf("go build: %w\n%s", err, out)
	}
	// A second version differs in its bytes at least.
	first, err := os.ReadFile(filepath.Join(m.shared, "cri-proxy"))
	if err != nil {
		return err
	}
	return errors.Join(
		os.WriteFile(m.shared+"/cri-proxy-v2", append(slices.Clip(first), "second"...), 0o755),
		os.WriteFile(m.shared+"/cri-proxy-bad",
			[]byte("#!/bin/sh\n[ \"$1\" = serve ] && exit 1\nexec /shared/cri-proxy \"$@\"\n"), 0o755),
		command(ctx, "systemctl", append([]string{"--quiet", "--root=" + m.root, "mask"}, masked...)...))
}

// installStandins puts into the machine what docs/OPERATIONS.md says, by hand.
func (m *machine) installStandins(ctx context.Context) error {
	config, err := os.ReadFile("../../systemd/config.yaml")
	if err != nil {
		return err
	}
	files := map[string][]byte{
		m.root + "/etc/cri-proxy/config.yaml": bytes.Replace(config,
			[]byte("\ndrainTimeout: 20s"), []byte("\ndrainTimeout: 1s"), 1),
		m.root + "/etc/systemd/system/containerd.service":             []byte(containerdUnit),
		m.root + "/etc/systemd/system/kubelet.service":                []byte(kubeletUnit),
		m.root + "/etc/systemd/system/cri-proxy@.service.d/test.conf": []byte(quick),
	}
	for path, b := range files {
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(path, b, 0o644); err != nil {
			return err
		}
	}
	copies := [][3]string{
		{m.shared + "/standin", "/usr/local/bin/standin", "0755"},
		{m.shared + "/cri-proxy", "/usr/local/bin/cri-proxy", "0755"},
		{"../../systemd/crash-guard", "/usr/local/lib/cri-proxy/crash-guard", "0755"},
		{"../../systemd/tmpfiles.conf", "/etc/tmpfiles.d/cri-proxy.conf", "0644"},
		{"../../systemd/cri-proxy@.service", "/etc/systemd/system/cri-proxy@.service", "0644"},
		{"../../systemd/cri-proxy.socket", "/etc/systemd/system/cri-proxy.socket", "0644"},
		{"../../systemd/cri-proxy-admin.socket", "/etc/systemd/system/cri-proxy-admin.socket", "0644"},
	}
	for _, c := range copies {
		if err := command(ctx, "install", "-D", "-m", c[2], c[0], m.root+c[1]); err != nil {
			return err
		}
	}
	// As on a machine that comes up with cri-proxy on it.
	for _, c := range [][]string{
		{"mkdir", "-p", m.root + "/usr/local/lib/cri-proxy/versions/first"},
		{"cp", m.shared + "/cri-proxy", m.root + "/usr/local/lib/cri-proxy/versions/first/cri-proxy"},
		{"ln", "-s", "versions/first", m.root + "/usr/local/lib/cri-proxy/a"},
		{"systemctl", "--root=" + m.root, "enable", "cri-proxy.socket", "cri-proxy-admin.socket", "cri-proxy@a.service",
			"containerd.service", "kubelet.service"},
	} {
		if err := command(ctx, c[0], c[1:]...); err != nil {
			return err
		}
	}
	return nil
}

// atCgroupRoot leaves, with cgroup v1, the cgroups of whoever runs the test: what a machine sees as
// the root is then this machine's.
const atCgroupRoot = `if [ "$(stat -f -c %T /sys/fs/cgroup)" != cgroup2fs ]; then for f in /sys/fs/cgroup/*/cgroup.procs; do echo $$ >"$f" || :; done; fi; `

// boot starts the machine and waits until it is up.
func (m *machine) boot(ctx context.Context) error {
	args := []string{"systemd-nspawn", "--quiet", "--register=no", "--keep-unit", "--console=pipe", "--boot",
		"--machine=cri-proxy-" + strconv.Itoa(os.Getpid()), "--directory=" + m.root, "--bind=" + m.shared + ":/shared"}
	if m.args == nil {
		args = append(args, "--private-network")
	}
	m.nspawn = exec.Command("sh",
		append([]string{"-c", atCgroupRoot + `exec "$@"`, "sh"}, append(args, m.args...)...)...)
	m.nspawn.Stdout, m.nspawn.Stderr = m.log, m.log
	m.nspawn.WaitDelay = time.Second
	if err := m.nspawn.Start(); err != nil {
		return err
	}
	m.ended = make(chan struct{})
	go func() { defer close(m.ended); _ = m.nspawn.Wait() }()
	if err := m.awaitUp(ctx); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(m.dir, "leader"), []byte(strconv.Itoa(m.leader())), 0o600)
}

// sweep takes away what a run that was killed has left.
func sweep(runs string) {
	left, _ := os.ReadDir(runs)
	for _, run := range left {
		if _, err := os.Stat("/proc/" + run.Name()); err == nil {
			continue
		}
		dir := filepath.Join(runs, run.Name())
		b, _ := os.ReadFile(filepath.Join(dir, "leader"))
		if pid, err := strconv.Atoi(string(b)); err == nil && isMachine(pid) {
			_ = unix.Kill(pid, unix.SIGKILL)
		}
		_ = unix.Unmount(filepath.Join(dir, "root"), unix.MNT_DETACH)
		_ = os.RemoveAll(dir)
	}
}

// isMachine reports whether the process is the first one of a PID namespace, with /shared in it.
func isMachine(pid int) bool {
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil || !strings.Contains(string(status), fmt.Sprintf("NSpid:\t%d\t1\n", pid)) {
		return false
	}
	_, err = os.Stat(fmt.Sprintf("/proc/%d/root/shared/standin", pid))
	return err == nil
}

// awaitUp waits until the machine has started everything.
func (m *machine) awaitUp(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, soon)
	defer cancel()
	var out string
	var err error
	for {
		out, err = m.run(ctx, "systemctl", "is-system-running")
		if state := strings.TrimSpace(out); state == "running" || state == "degraded" {
			return nil
		}
		select {
		case <-m.ended:
			return errors.New("the machine has ended")
		case <-ctx.Done():
			return fmt.Errorf("the machine does not come up: %w: %s", err, out)
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// leader is the machine's first process, 0 if there is none.
func (m *machine) leader() int {
	if m.nspawn == nil || m.nspawn.Process == nil {
		return 0
	}
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", m.nspawn.Process.Pid, m.nspawn.Process.Pid))
	if err != nil {
		return 0
	}
	for _, f := range strings.Fields(string(b)) {
		if comm, err := os.ReadFile("/proc/" + f + "/comm"); err == nil &&
			strings.TrimSpace(string(comm)) == "systemd" {
			pid, _ := strconv.Atoi(f)
			return pid
		}
	}
	return 0
}

// run runs a command in the machine and returns what it says.
func (m *machine) run(ctx context.Context, args ...string) (string, error) {
	leader := m.leader()
	if leader == 0 {
		return "", errors.New("the machine is not there")
	}
	cmd := exec.CommandContext(ctx, "nsenter",
		append([]string{"--target", strconv.Itoa(leader), "--mount", "--uts", "--ipc", "--net", "--pid", "--root",
			"--wd", "--"}, args...)...)
	cmd.Env = []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin:/opt/bin", "HOME=/root"}
	cmd.WaitDelay = time.Second
	out, err := cmd.CombinedOutput()
	if err != nil {
		err = fmt.Errorf("%s: %w", strings.Join(args, " "), err)
	}
	return string(out), err
}

// stop takes everything away.
func (m *machine) stop() {
	if m.nspawn != nil && m.nspawn.Process != nil {
		if leader := m.leader(); leader != 0 {
			_ = unix.Kill(leader, unix.SIGKILL) // and with it all that is in its namespace
			// nspawn waits for that: until then there are those who write into what is removed
			// below.
			select {
			case <-m.ended:
			case <-time.After(soon):
			}
		}
		_ = m.nspawn.Process.Kill()
		<-m.ended
	}
	_ = unix.Unmount(m.root, unix.MNT_DETACH)
	_ = os.RemoveAll(m.dir)
}

// must runs a command in the machine.
func (m *machine) must(t *testing.T, args ...string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), soon)
	defer cancel()
	out, err := m.run(ctx, args...)
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	return out
}

// fails runs a command that is to fail.
func (m *machine) fails(t *testing.T, args ...string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 2*soon)
	defer cancel()
	out, err := m.run(ctx, args...)
	if err == nil {
		t.Fatalf("%s has not failed\n%s", strings.Join(args, " "), out)
	}
	return out
}

// show is a property of a unit.
func (m *machine) show(t *testing.T, unit, property string) string {
	t.Helper()
	return strings.TrimSpace(m.must(t, "systemctl", "show", "--value", "-p", property, unit))
}

// await waits for a condition.
func await(t *testing.T, what string, is func() bool) {
	t.Helper()
	for end := time.Now().Add(soon); !is(); {
		if time.Now().After(end) {
			t.Fatalf("waited for %s", what)
		}
		<-time.After(20 * time.Millisecond)
	}
}

// failure and report are what the stand-in for kubelet tells; see standin.
type failure struct {
	What         string
	Began, Ended time.Time
	Error        string
}

type report struct {
	Started  time.Time
	Calls    int
	Failures []failure
	Slowest  time.Duration
	Streams  int
	// StreamEnded is when kubelet saw the last event stream end.
	StreamEnded time.Time
	PullsDone   int
}

func (m *machine) kubelet(t *testing.T) report {
	t.Helper()
	f, err := os.Open(filepath.Join(m.shared, "kubelet.json"))
	if errors.Is(err, os.ErrNotExist) {
		return report{} // the first kubelet has not told anything yet
	}
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	b, err := io.ReadAll(f)
	var r report
	if err == nil {
		err = json.Unmarshal(b, &r)
	}
	if err != nil {
		t.Fatalf("%v: %s", err, b)
	}
	return r
}

// freshKubelet starts kubelet anew, so that its counts begin here.
func (m *machine) freshKubelet(t *testing.T) {
	t.Helper()
	now := time.Now()
	m.must(t, "systemctl", "restart", "kubelet.service")
	await(t, "kubelet", func() bool { r := m.kubelet(t); return r.Started.After(now) && r.Calls > 20 && r.Streams > 0 })
}

// moreCalls waits until some calls of kubelet's have been answered that began after now.
func (m *machine) moreCalls(t *testing.T) {
	t.Helper()
	answered := func() int { r := m.kubelet(t); return r.Calls - len(r.Failures) }
	before := answered()
	await(t, "kubelet's calls", func() bool { return answered() > before+40 })
}

// beginPull has kubelet pull an image until the file release is there, and waits until the runtime
// is at it.
func (m *machine) beginPull(t *testing.T) {
	t.Helper()
	pulling := filepath.Join(m.shared, "pulling")
	for _, file := range []string{pulling, filepath.Join(m.shared, "release")} {
		if err := os.Remove(file); err != nil && !errors.Is(err, os.ErrNotExist) {
			t.Fatal(err)
		}
	}
	touch(t, m, "pull")
	await(t, "the pull", func() bool { _, err := os.Stat(pulling); return err == nil })
}

// noFailures checks that no call of kubelet's has failed that began after since.
func (m *machine) noFailures(t *testing.T, since time.Time) report {
	t.Helper()
	r := m.kubelet(t)
	for _, f := range r.Failures {
		if f.Began.After(since) {
			t.Errorf("failed: %s, begun %s, took %s: %s", f.What, f.Began.Format(time.StampMilli), f.Ended.Sub(f.Began),
				f.Error)
		}
	}
	return r
}

// serving returns the instance whose process answers, and its process.
func (m *machine) serving(t *testing.T) (instance string, pid string) {
	t.Helper()
	for _, i := range []string{"a", "b"} {
		if m.show(t, "cri-proxy@"+i, "ActiveState") == "active" &&
			!strings.HasPrefix(m.show(t, "cri-proxy@"+i, "StatusText"), "Handed over") {
			return i, m.show(t, "cri-proxy@"+i, "MainPID")
		}
	}
	return "", ""
}

// signal sends a signal to the process of the instance that serves.
func (m *machine) signal(t *testing.T, name string) (instance, pid string) {
	t.Helper()
	instance, pid = m.serving(t)
	m.must(t, "sh", "-c", "kill -"+name+" "+pid)
	return instance, pid
}

// counted is the proxy's own count of calls.
func (m *machine) counted(t *testing.T) (calls uint64, bypass string) {
	t.Helper()
	var s struct {
		Bypass   string
		Counters struct{ Calls string }
	}
	out := m.must(t, "cri-proxy", "ctl", "status", "-o", "json")
	if err := json.Unmarshal([]byte(out), &s); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	calls, _ = strconv.ParseUint(s.Counters.Calls, 10, 64)
	return calls, s.Bypass
}
