// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package gate

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// waitLong bounds every wait of a test; reaching it is a failure.
const waitLong = 2 * time.Minute

func bounded(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), waitLong)
	t.Cleanup(cancel)
	return ctx
}

// holds is for Await where the hook is sure to come.
func holds() error { return nil }

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// made is a gate whose files are there, in a directory that every user may look into.
func made(t *testing.T) *Gate {
	t.Helper()
	if len(hook) == 0 {
		t.Skipf("no hook for %s", runtime.GOARCH)
	}
	g := At(filepath.Join(t.TempDir(), "gate"))
	for dir := g.dir; dir != os.TempDir() && dir != "/"; dir = filepath.Dir(dir) {
		if err := os.Chmod(dir, 0o755); err != nil && !errors.Is(err, fs.ErrNotExist) {
			t.Fatal(err)
		}
	}
	must(t, g.Make())
	t.Cleanup(func() {
		if err := g.Remove(); err != nil {
			t.Error(err)
		}
	})
	return g
}

// process is a running hook.
type process struct {
	cmd   *exec.Cmd
	ended chan struct{}
}

// run runs the hook of the gate as the container's process does.
func run(t *testing.T, g *Gate, attr *syscall.SysProcAttr, args ...string) *process {
	t.Helper()
	if args == nil {
		args = []string{filepath.Join(g.dir, fifoName)}
	}
	p := &process{cmd: exec.Command(filepath.Join(g.dir, hookName), args...), ended: make(chan struct{})}
	p.cmd.SysProcAttr = attr
	p.cmd.Env = []string{}
	must(t, p.cmd.Start())
	go func() { // ends with the process, which is killed at the latest when the test ends
		defer close(p.ended)
		_ = p.cmd.Wait() // how it ended is in ProcessState
	}()
	t.Cleanup(func() {
		_ = p.cmd.Process.Kill() // it has ended, in a test that passes
		<-p.ended
	})
	return p
}

func (p *process) code(t *testing.T) int {
	t.Helper()
	select {
	case <-p.ended:
		return p.cmd.ProcessState.ExitCode()
	case <-time.After(waitLong):
		t.Fatal("the hook goes on")
		return 0
	}
}

// asleep waits until the hook sleeps in the system call.
func (p *process) asleep(t *testing.T, call string) {
	t.Helper()
	for late := time.Now().Add(waitLong); ; time.Sleep(time.Millisecond) { // asks the kernel
		b, err := os.ReadFile("/proc/" + itoa(p.cmd.Process.Pid) + "/syscall")
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, fs.ErrPermission) {
			t.Skip("the kernel does not tell what a process waits for")
		}
		must(t, err)
		if number, _, _ := strings.Cut(string(b), " "); number == call {
			return
		}
		if time.Now().After(late) {
			t.Fatalf("the hook is in %q", b)
		}
	}
}

func itoa(n int) string { b, _ := json.Marshal(n); return string(b) }

func callNumber(n uintptr) string { return itoa(int(n)) }

func TestHook(t *testing.T) {
	for _, tc := range []struct {
		name string
		send string
		code int
	}{
		{"go", "g", 0},
		{"go, and more", "gx", 0},
		{"abort", "x", 9},
		{"zero byte", "\x00", 9},
		{"capital", "G", 9},
	} {
		t.Run(tc.name, func(t *testing.T) {
			g := made(t)
			p := run(t, g, nil)
			must(t, g.Await(bounded(t), holds))
			if _, err := g.fifo.WriteString(tc.send); err != nil {
				t.Error(err)
			}
			if got := p.code(t); got != tc.code {
				t.Errorf("the hook ended with %d, want %d", got, tc.code)
			}
		})
	}
}

func TestHookThatCannot(t *testing.T) {
	g := made(t)
	for name, args := range map[string][]string{
		"no FIFO":     {filepath.Join(g.dir, "none")},
		"no name":     {},
		"a directory": {g.dir},
	} {
		t.Run(name, func(t *testing.T) {
			if got := run(t, g, nil, args...).code(t); got != 3 {
				t.Errorf("the hook ended with %d, want 3", got)
			}
		})
	}
}

// The process that holds the gate dies, the next one takes over. The hook has a descriptor for the
// FIFO at every moment, or the next process could find nobody.
func TestHookSurvivesItsWriters(t *testing.T) {
	g := made(t)
	p := run(t, g, nil)
	for range 20 {
		must(t, g.Await(bounded(t), holds))
		g.Leave()
	}
	next := At(g.dir)
	must(t, next.Await(bounded(t), holds))
	select {
	case <-p.ended:
		t.Fatal("the hook did not wait for the next writer")
	default:
	}
	g.Leave() // again is fine
	must(t, next.Open())
	if got := p.code(t); got != 0 {
		t.Errorf("the hook ended with %d", got)
	}
	next.Leave()
}

// A writer that is there for a moment, before the hook has noticed that the one before is gone, is
// not lost.
func TestHookBetweenWriters(t *testing.T) {
	g := made(t)
	p := run(t, g, nil)
	must(t, g.Await(bounded(t), holds))
	next := At(g.dir)
	must(t, next.Await(bounded(t), holds))
	g.Leave()
	must(t, next.Open())
	next.Leave()
	if got := p.code(t); got != 0 {
		t.Errorf("the hook ended with %d", got)
	}
}

func TestHookIsLeftOpenHanded(t *testing.T) {
	g := made(t)
	p := run(t, g, nil)
	must(t, g.Await(bounded(t), holds))
	g.Leave()
	p.asleep(t, callNumber(unix.SYS_OPENAT)) // for the next writer
	fds, err := os.ReadDir("/proc/" + itoa(p.cmd.Process.Pid) + "/fd")
	must(t, err)
	readers := 0
	for _, fd := range fds {
		if to, err := os.Readlink("/proc/" + itoa(p.cmd.Process.Pid) + "/fd/" + fd.Name()); err == nil &&
			strings.HasSuffix(to, "/"+fifoName) {
			readers++
		}
	}
	if readers != 1 {
		t.Errorf("the hook has %d descriptors for the FIFO, want 1", readers)
	}
}

// Signals that a handler elsewhere would catch do not disturb it; those that end a process do.
func TestHookAndSignals(t *testing.T) {
	g := made(t)
	p := run(t, g, nil)
	must(t, g.Await(bounded(t), holds))
	p.asleep(t, callNumber(unix.SYS_READ))
	for _, s := range []syscall.Signal{syscall.SIGSTOP, syscall.SIGCONT, syscall.SIGWINCH, syscall.SIGCHLD} {
		must(t, p.cmd.Process.Signal(s))
	}
	must(t, g.Open())
	if got := p.code(t); got != 0 {
		t.Errorf("the hook ended with %d", got)
	}
	p = run(t, made(t), nil)
	must(t, p.cmd.Process.Signal(syscall.SIGTERM))
	if got := p.code(t); got != -1 {
		t.Errorf("the hook ended with %d after SIGTERM", got)
	}
}

// With nobody there the hook has a timer running, and none with somebody.
func TestHookGivesUp(t *testing.T) {
	g := made(t)
	p := run(t, g, nil)
	p.asleep(t, callNumber(unix.SYS_OPENAT))
	must(t, p.cmd.Process.Signal(syscall.SIGALRM)) // what the timer does after its time
	if got := p.code(t); got != -1 {
		t.Errorf("the hook ended with %d", got)
	}
	if held, err := g.hold(); held || err != nil {
		t.Errorf("held: %t, %v", held, err)
	}
}

// As in a container: another user, no groups, no privileges to come, no capabilities.
func TestHookOfAnotherUser(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root")
	}
	mask := syscall.Umask(0o077)
	defer syscall.Umask(mask)
	g := made(t)
	p := run(t, g, &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}})
	must(t, g.Await(bounded(t), holds))
	must(t, g.Open())
	if got := p.code(t); got != 0 {
		t.Errorf("the hook ended with %d", got)
	}
}

func TestHookIsWhatItsSourceSays(t *testing.T) {
	out := t.TempDir()
	if _, err := exec.LookPath("as"); err != nil {
		t.Skip("no binutils")
	}
	if b, err := exec.CommandContext(bounded(t), "sh", "hook/build.sh", out).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, b)
	}
	built, err := filepath.Glob(filepath.Join(out, "*"))
	must(t, err)
	if len(built) == 0 {
		t.Fatal("nothing was assembled")
	}
	for _, file := range built {
		got, err := os.ReadFile(file)
		must(t, err)
		want, err := os.ReadFile(filepath.Join("hook", filepath.Base(file)))
		must(t, err)
		if !bytes.Equal(got, want) {
			t.Errorf("%s is not what its source makes: run ops/gate/hook/build.sh", filepath.Base(file))
		}
	}
}

func TestMake(t *testing.T) {
	mask := syscall.Umask(0o077)
	defer syscall.Umask(mask)
	g := At(filepath.Join(t.TempDir(), "a", "gate"))
	if g.Exists() {
		t.Error("it exists before it is made")
	}
	for range 2 { // again is fine
		must(t, g.Make())
	}
	if !g.Exists() {
		t.Error("it does not exist")
	}
	for name, want := range map[string]fs.FileMode{"": fs.ModeDir | 0o755, hookName: 0o755,
		fifoName: fs.ModeNamedPipe | 0o666} {
		st, err := os.Lstat(filepath.Join(g.dir, name))
		must(t, err)
		if st.Mode() != want {
			t.Errorf("%q has mode %s, want %s", name, st.Mode(), want)
		}
	}
	for range 2 {
		must(t, g.Remove())
	}
	if _, err := os.Lstat(g.dir); !errors.Is(err, fs.ErrNotExist) || g.Exists() {
		t.Errorf("after Remove: %v", err)
	}
}

// A hook of a process before may still be running when its gate is made anew: it neither is in the
// way nor takes the byte that is for the next one.
func TestMakeWhileTheHookRuns(t *testing.T) {
	g := made(t)
	before := run(t, g, nil)
	before.asleep(t, callNumber(unix.SYS_OPENAT))
	must(t, g.Make())
	p := run(t, g, nil)
	must(t, g.Await(bounded(t), holds))
	must(t, g.Open())
	if got := p.code(t); got != 0 {
		t.Errorf("the hook ended with %d", got)
	}
	select {
	case <-before.ended:
		t.Errorf("the one before ended with %d", before.code(t))
	default:
	}
}

// Whatever the process starts meanwhile, the hook can be run as soon as it is made.
func TestMakeBesideOtherStarts(t *testing.T) {
	if len(hook) == 0 {
		t.Skipf("no hook for %s", runtime.GOARCH)
	}
	ctx, cancel := context.WithCancel(t.Context())
	var others sync.WaitGroup
	for range 4 {
		others.Go(func() {
			for ctx.Err() == nil {
				if err := exec.Command("true").Run(); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	g := At(filepath.Join(t.TempDir(), "gate"))
	for range 300 {
		must(t, g.Make())
		var ended *exec.ExitError
		// it has run, in vain
		if err := exec.Command(filepath.Join(g.dir, hookName), filepath.Join(g.dir, "none")).
			Run(); !errors.As(err, &ended) {
			t.Errorf("the hook is not run: %v", err)
			break
		}
	}
	cancel()
	others.Wait()
	must(t, g.Remove())
}

func TestMakeWhereItCannot(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	must(t, os.WriteFile(file, nil, 0o600))
	if err := At(filepath.Join(file, "gate")).Make(); err == nil {
		t.Error("made below a file")
	}
	dir := t.TempDir()
	must(t, os.MkdirAll(filepath.Join(dir, hookName, "x"), 0o755))
	if err := At(dir).Make(); err == nil {
		t.Error("made over a directory")
	}
}

func TestAwait(t *testing.T) {
	t.Run("gives up when asked to", func(t *testing.T) {
		g := made(t)
		asked, no := 0, errors.New("it has ended")
		err := g.Await(bounded(t), func() error {
			if asked++; asked == 3 {
				return no
			}
			return nil
		})
		if !errors.Is(err, no) || asked != 3 {
			t.Errorf("got %v after %d", err, asked)
		}
		if err := g.Open(); !errors.Is(err, ErrNotHeld) {
			t.Errorf("opened: %v", err)
		}
	})
	t.Run("the hook comes with the bad news", func(t *testing.T) {
		g := made(t)
		err := g.Await(bounded(t), func() error {
			run(t, g, nil).asleep(t, callNumber(unix.SYS_OPENAT))
			return errors.New("it has ended")
		})
		must(t, err)
		must(t, g.Open())
	})
	t.Run("ends with its context", func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		err := made(t).Await(ctx, func() error { cancel(); return nil })
		if !errors.Is(err, context.Canceled) {
			t.Errorf("got %v", err)
		}
	})
	t.Run("no files", func(t *testing.T) {
		if err := At(filepath.Join(t.TempDir(), "none")).Await(bounded(t), holds); !errors.Is(err, ErrNotHeld) {
			t.Errorf("got %v", err)
		}
	})
	t.Run("files that are none", func(t *testing.T) {
		dir := t.TempDir()
		must(t, os.Mkdir(filepath.Join(dir, fifoName), 0o755))
		if err := At(dir).Await(bounded(t), holds); err == nil || errors.Is(err, ErrNotHeld) {
			t.Errorf("got %v", err)
		}
	})
	t.Run("twice", func(t *testing.T) {
		g := made(t)
		p := run(t, g, nil)
		must(t, g.Await(bounded(t), holds))
		must(t, g.Await(bounded(t), func() error { return errors.New("asked for no reason") }))
		must(t, g.Open())
		p.code(t)
	})
}

// The container has died at its gate: opening says so, and no signal ends this process.
func TestOpenForNobody(t *testing.T) {
	g := made(t)
	p := run(t, g, nil)
	must(t, g.Await(bounded(t), holds))
	must(t, p.cmd.Process.Kill())
	p.code(t)
	if err := g.Open(); !errors.Is(err, unix.EPIPE) {
		t.Errorf("got %v, want a broken pipe", err)
	}
	must(t, g.Remove())
	if err := g.Open(); !errors.Is(err, ErrNotHeld) {
		t.Errorf("got %v after Remove", err)
	}
}

func TestTry(t *testing.T) {
	if len(hook) == 0 {
		t.Skipf("no hook for %s", runtime.GOARCH)
	}
	dir := filepath.Join(t.TempDir(), "state", "gates")
	for range 2 {
		must(t, Try(bounded(t), dir))
	}
	left, err := os.ReadDir(dir)
	must(t, err)
	if len(left) > 0 {
		t.Errorf("left: %v", left)
	}
	if st, err := os.Stat(dir); err != nil || st.Mode().Perm() != 0o700 {
		t.Errorf("%v, %v", st.Mode(), err)
	}

	t.Run("after a process that died in it", func(t *testing.T) {
		g := At(filepath.Join(dir, "try"))
		must(t, g.Make())
		run(t, g, nil).asleep(t, callNumber(unix.SYS_OPENAT))
		if err := Try(bounded(t), dir); err != nil {
			t.Error(err)
		}
	})
	t.Run("no directory", func(t *testing.T) {
		file := filepath.Join(t.TempDir(), "file")
		must(t, os.WriteFile(file, nil, 0o600))
		if err := Try(bounded(t), filepath.Join(file, "gates")); err == nil {
			t.Error("works below a file")
		}
	})
	t.Run("noexec", func(t *testing.T) {
		dir := t.TempDir()
		if err := unix.Mount("none", dir, "tmpfs", unix.MS_NOEXEC, ""); err != nil {
			t.Skipf("cannot mount: %v", err)
		}
		defer func() { must(t, unix.Unmount(dir, 0)) }()
		err := Try(bounded(t), dir)
		if err == nil || !strings.Contains(err.Error(), "noexec") {
			t.Errorf("got %v", err)
		}
		left, err := os.ReadDir(dir)
		must(t, err)
		if len(left) > 0 {
			t.Errorf("left: %v", left)
		}
	})
	t.Run("ended", func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if err := Try(ctx, t.TempDir()); !errors.Is(err, context.Canceled) {
			t.Errorf("got %v", err)
		}
	})
}

func TestWriteSpec(t *testing.T) {
	mask := syscall.Umask(0o022)
	defer syscall.Umask(mask)
	dir := filepath.Join(t.TempDir(), "var", "cdi")
	file := filepath.Join(dir, specFile)
	must(t, WriteSpec(dir))
	var got struct {
		CDIVersion string `json:"cdiVersion"`
		Kind       string `json:"kind"`
		Devices    []struct {
			Name           string `json:"name"`
			ContainerEdits struct {
				Hooks []struct {
					HookName string   `json:"hookName"`
					Path     string   `json:"path"`
					Args     []string `json:"args"`
				} `json:"hooks"`
			} `json:"containerEdits"`
		} `json:"devices"`
	}
	b, err := os.ReadFile(file)
	must(t, err)
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	must(t, d.Decode(&got))
	if len(got.Devices) != 1 || got.Kind+"="+got.Devices[0].Name != device ||
		len(got.Devices[0].ContainerEdits.Hooks) != 1 {
		t.Fatalf("spec is %+v", got)
	}
	h := got.Devices[0].ContainerEdits.Hooks[0]
	if h.HookName != "startContainer" || h.Path != "/dev/.cri-proxy/hook" ||
		strings.Join(h.Args, " ") != "hook /dev/.cri-proxy/gate" {
		t.Errorf("hook is %+v", h)
	}

	before, err := os.Stat(file)
	must(t, err)
	must(t, WriteSpec(dir))
	after, err := os.Stat(file)
	must(t, err)
	if !os.SameFile(before, after) {
		t.Error("written although it was there")
	}
	for name, spoil := range map[string]func() error{
		"another content": func() error { return os.WriteFile(file, []byte("{}"), 0o600) },
		"gone":            func() error { return os.Remove(file) },
		"half of an earlier try": func() error {
			return errors.Join(os.Remove(file),
				os.WriteFile(filepath.Join(dir, "."+specFile+".tmp"), []byte("{"), 0o600))
		},
	} {
		t.Run(name, func(t *testing.T) {
			must(t, spoil())
			must(t, WriteSpec(dir))
			b, err := os.ReadFile(file)
			must(t, err)
			if string(b) != spec {
				t.Errorf("the file has %q", b)
			}
			files, err := os.ReadDir(dir)
			must(t, err)
			if len(files) != 1 {
				t.Errorf("the directory has %v", files)
			}
		})
	}
	if err := WriteSpec(filepath.Join(file, "x")); err == nil {
		t.Error("written below a file")
	}
}

func TestInjectAndStrip(t *testing.T) {
	own := &runtimeapi.ContainerConfig{
		CDIDevices: []*runtimeapi.CDIDevice{{Name: "vendor.com/gpu=0"}},
		Mounts: []*runtimeapi.Mount{{HostPath: "/data", ContainerPath: "/data"},
			{HostPath: "/x", ContainerPath: "/dev/.cri-proxy-not"}},
	}
	c := proto.Clone(own).(*runtimeapi.ContainerConfig)
	At("/state/gates/1").Inject(c)
	if len(c.GetCDIDevices()) != 2 || c.GetCDIDevices()[1].GetName() != device {
		t.Errorf("devices are %v", c.GetCDIDevices())
	}
	want := &runtimeapi.Mount{HostPath: "/state/gates/1", ContainerPath: mountPoint, Readonly: true,
		SelinuxRelabel: true}
	if len(c.GetMounts()) != 3 || !proto.Equal(c.GetMounts()[2], want) {
		t.Errorf("mounts are %v", c.GetMounts())
	}
	if !strings.HasPrefix(spec[strings.Index(spec, `"path":"`)+8:], mountPoint+"/") {
		t.Error("the hook is not where the mount is")
	}
	Strip(c)
	if !proto.Equal(c, own) {
		t.Errorf("stripped, it is %v, was %v", c, own)
	}
	Strip(c)
	if !proto.Equal(c, own) {
		t.Errorf("stripped twice, it is %v, was %v", c, own)
	}
}

func TestFits(t *testing.T) {
	for at, want := range map[string]bool{
		"/data": true, "/dev/shm": true, "/dev/termination-log": true, "/devices": true,
		"/dev": false, "/dev/": false, "/./dev": false, "/dev/.cri-proxy": false, "/dev/x/../.cri-proxy/": false,
	} {
		err := Fits(
			&runtimeapi.ContainerConfig{Mounts: []*runtimeapi.Mount{{ContainerPath: "/a"}, {ContainerPath: at}}})
		if (err == nil) != want {
			t.Errorf("a mount at %s: %v", at, err)
		}
	}
	if err := Fits(nil); err != nil {
		t.Error(err)
	}
}

func TestWaiting(t *testing.T) {
	if Waiting(os.Getpid()) || Waiting(0) || Waiting(1<<30) {
		t.Error("something waits")
	}
	// What counts is the name, which runc gives to the process that becomes the container's.
	name := filepath.Join(t.TempDir(), "runc:[2:INIT]")
	sleep, err := exec.LookPath("sleep")
	must(t, err)
	must(t, os.Symlink(sleep, name))
	cmd := exec.Command(name, "600")
	must(t, cmd.Start())
	defer func() {
		_ = cmd.Wait() // it is killed
	}()
	defer func() { must(t, cmd.Process.Kill()) }()
	// The kernel tells of the new program a moment before it gives the process its name.
	for late := time.Now().Add(waitLong); !Waiting(cmd.Process.Pid); runtime.Gosched() {
		if time.Now().After(late) {
			t.Fatal("runc's process does not wait")
		}
	}
}
