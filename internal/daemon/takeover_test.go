// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	logtest "github.com/sirupsen/logrus/hooks/test"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/internal/config"
	"github.com/cri-proxy/cri-proxy/internal/takeover"
)

// slowRuntime is a runtime whose pulls, stops and removals take until they are released.
type slowRuntime struct {
	runtimeapi.UnimplementedRuntimeServiceServer
	runtimeapi.UnimplementedImageServiceServer
	began   chan string // the method of a call that takes its time
	release chan struct{}
	server  *grpc.Server
}

func (*slowRuntime) Version(context.Context, *runtimeapi.VersionRequest) (*runtimeapi.VersionResponse, error) {
	return &runtimeapi.VersionResponse{Version: "0.1.0", RuntimeName: "slow"}, nil
}

func (*slowRuntime) ListContainers(
	context.Context, *runtimeapi.ListContainersRequest,
) (*runtimeapi.ListContainersResponse, error) {
	return &runtimeapi.ListContainersResponse{Containers: []*runtimeapi.Container{{Id: "a"}}}, nil
}

func (*slowRuntime) ContainerStatus(
	_ context.Context, req *runtimeapi.ContainerStatusRequest,
) (*runtimeapi.ContainerStatusResponse, error) {
	return &runtimeapi.ContainerStatusResponse{Status: &runtimeapi.ContainerStatus{Id: req.GetContainerId()}}, nil
}

func (r *slowRuntime) take(ctx context.Context, what string) error {
	r.began <- what
	select {
	case <-r.release:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (r *slowRuntime) PullImage(
	ctx context.Context, req *runtimeapi.PullImageRequest,
) (*runtimeapi.PullImageResponse, error) {
	return &runtimeapi.PullImageResponse{ImageRef: req.GetImage().GetImage()}, r.take(ctx, "PullImage")
}

func (r *slowRuntime) StopContainer(
	ctx context.Context, _ *runtimeapi.StopContainerRequest,
) (*runtimeapi.StopContainerResponse, error) {
	return &runtimeapi.StopContainerResponse{}, r.take(ctx, "StopContainer")
}

func (r *slowRuntime) RemoveContainer(
	ctx context.Context, _ *runtimeapi.RemoveContainerRequest,
) (*runtimeapi.RemoveContainerResponse, error) {
	return &runtimeapi.RemoveContainerResponse{}, r.take(ctx, "RemoveContainer")
}

func (r *slowRuntime) GetContainerEvents(
	_ *runtimeapi.GetEventsRequest, s grpc.ServerStreamingServer[runtimeapi.ContainerEventResponse],
) error {
	if err := s.Send(&runtimeapi.ContainerEventResponse{ContainerId: "a"}); err != nil {
		return err
	}
	<-s.Context().Done()
	return s.Context().Err()
}

func startSlowRuntime(t *testing.T, path string) *slowRuntime {
	t.Helper()
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	s := grpc.NewServer()
	r := &slowRuntime{began: make(chan string, 8), release: make(chan struct{}), server: s}
	runtimeapi.RegisterRuntimeServiceServer(s, r)
	runtimeapi.RegisterImageServiceServer(s, r)
	var owned sync.WaitGroup
	owned.Go(func() { _ = s.Serve(l) })
	t.Cleanup(func() {
		s.Stop()
		owned.Wait()
	})
	return r
}

// twins are processes that share their listening sockets, as the instances of the unit do.
type twins struct {
	t       *testing.T
	c       *config.Config
	sockets []*os.File
	runtime *slowRuntime
	kubelet *grpc.ClientConn
	args    []string // of the daemon, beyond the usual
}

func newTwins(t *testing.T) *twins {
	t.Helper()
	c := newConfig(t)
	w := &twins{t: t, c: c, runtime: startSlowRuntime(t, runtimePath(c))}
	if err := os.MkdirAll(filepath.Dir(c.Listen.Path), 0o700); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{c.Listen.Path, c.AdminSocket} {
		l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
		if err != nil {
			t.Fatal(err)
		}
		f, err := l.File()
		if err != nil {
			t.Fatal(err)
		}
		l.SetUnlinkOnClose(false)
		l.Close()
		t.Cleanup(func() { f.Close() })
		w.sockets = append(w.sockets, f)
	}
	w.kubelet = dial(t, c.Listen.Path)
	return w
}

// twin is one of them.
type twin struct {
	cmd    *exec.Cmd
	stderr *strings.Builder
	ended  chan struct{}
}

func (w *twins) start() *twin {
	w.t.Helper()
	cmd, stderr := startProcess(w.t, w.c, []string{"cri", "admin"}, w.args...)
	cmd.ExtraFiles = w.sockets
	if err := cmd.Start(); err != nil {
		w.t.Fatal(err)
	}
	p := &twin{cmd: cmd, stderr: stderr, ended: make(chan struct{})}
	go func() { defer close(p.ended); _ = cmd.Wait() }()
	w.t.Cleanup(func() {
		_ = cmd.Process.Kill()
		<-p.ended
		if w.t.Failed() {
			w.t.Logf("process %d:\n%s", cmd.Process.Pid, stderr)
		}
	})
	return p
}

// serving returns the process that answers commands.
func (w *twins) serving() time.Time {
	w.t.Helper()
	conn := dial(w.t, w.c.AdminSocket)
	ctx := w.ctx()
	for {
		info, err := opsv1.NewOpsClient(conn).NodeInfo(ctx, &opsv1.NodeInfoRequest{}, grpc.WaitForReady(true))
		if err == nil {
			return info.GetStartTime().AsTime()
		}
		// it was cut by a takeover: whoever commands asks again
		if status.Code(err) != codes.Unavailable || ctx.Err() != nil {
			w.t.Fatal(err)
		}
	}
}

// awaitAnother waits until another process answers commands than the one that began at that time.
func (w *twins) awaitAnother(than time.Time) time.Time {
	w.t.Helper()
	for ctx := w.ctx(); ctx.Err() == nil; {
		if at := w.serving(); !at.Equal(than) {
			return at
		}
		select {
		case <-time.After(10 * time.Millisecond):
		case <-ctx.Done():
		}
	}
	w.t.Fatal("no other process serves")
	return time.Time{}
}

func (w *twins) ctx() context.Context {
	ctx, cancel := context.WithTimeout(w.t.Context(), deadline)
	w.t.Cleanup(cancel)
	return ctx
}

// code waits for the end of the process.
func (p *twin) code(t *testing.T) int {
	t.Helper()
	select {
	case <-p.ended:
		return p.cmd.ProcessState.ExitCode()
	case <-time.After(deadline):
		t.Fatal("the process has not ended")
		return 0
	}
}

// traffic is kubelet: short calls, some at the same time, and an event stream that it opens again.
type traffic struct {
	stop     context.CancelFunc
	owned    sync.WaitGroup
	calls    atomic.Int64
	streams  atomic.Int64
	slowest  atomic.Int64
	mu       sync.Mutex // guards failures
	failures []string
}

func (w *twins) traffic() *traffic {
	ctx, stop := context.WithCancel(w.t.Context())
	f := &traffic{stop: stop}
	cri := runtimeapi.NewRuntimeServiceClient(w.kubelet)
	for i := range 8 {
		f.owned.Go(func() {
			for tick := time.NewTicker(40 * time.Millisecond); ; {
				select {
				case <-tick.C:
				case <-ctx.Done():
					tick.Stop()
					return
				}
				began := time.Now()
				var err error
				if i%2 == 0 {
					_, err = cri.ListContainers(context.WithoutCancel(ctx), &runtimeapi.ListContainersRequest{})
				} else {
					_, err = cri.ContainerStatus(context.WithoutCancel(ctx),
						&runtimeapi.ContainerStatusRequest{ContainerId: "a"})
				}
				f.calls.Add(1)
				if took := int64(time.Since(began)); took > f.slowest.Load() {
					f.slowest.Store(took)
				}
				if err != nil {
					f.failed(err)
				}
			}
		})
	}
	f.owned.Go(func() {
		for ctx.Err() == nil {
			s, err := cri.GetContainerEvents(ctx, &runtimeapi.GetEventsRequest{})
			if err == nil {
				_, err = s.Recv()
			}
			if err != nil {
				if ctx.Err() == nil {
					f.failed(fmt.Errorf("event stream: %w", err))
				}
				return
			}
			f.streams.Add(1)
			_, err = s.Recv()
			if ctx.Err() == nil && status.Code(err) != codes.Unavailable {
				f.failed(fmt.Errorf("end of the event stream: %w", err))
				return
			}
		}
	})
	w.t.Cleanup(func() { stop(); f.owned.Wait() })
	return f
}

func (f *traffic) failed(err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.failures = append(f.failures, err.Error())
}

// end reports that nothing has failed.
func (f *traffic) end(t *testing.T) {
	t.Helper()
	f.stop()
	f.owned.Wait()
	t.Logf("%d calls, slowest %s, %d event streams", f.calls.Load(),
		time.Duration(f.slowest.Load()).Round(time.Millisecond), f.streams.Load())
	f.mu.Lock()
	defer f.mu.Unlock()
	if len(f.failures) > 0 {
		t.Errorf("%d calls failed, such as: %s", len(f.failures), f.failures[0])
	}
}

// await waits until n more calls have been answered.
func (f *traffic) await(t *testing.T, n int64) {
	t.Helper()
	for want, end := f.calls.Load()+n, time.Now().Add(deadline); f.calls.Load() < want; {
		if time.Now().After(end) {
			t.Fatal("calls are not answered")
		}
		<-time.After(time.Millisecond)
	}
}

// awaitStreams waits until an event stream has been opened for the nth time.
func (f *traffic) awaitStreams(t *testing.T, n int64) {
	t.Helper()
	for end := time.Now().Add(deadline); f.streams.Load() < n; {
		if time.Now().After(end) {
			t.Fatalf("%d event streams, want %d", f.streams.Load(), n)
		}
		<-time.After(time.Millisecond)
	}
}

// A second process takes over from the first, and a third from the second: no call fails, and what
// takes long goes on in the process in which it began.
func TestTakeover(t *testing.T) {
	w := newTwins(t)
	first := w.start()
	at := w.serving()
	f := w.traffic()
	f.await(t, 20)
	f.awaitStreams(t, 1)
	slow := make(chan error, 2)
	ctx := t.Context() // they are released
	go func() {
		_, err := runtimeapi.NewImageServiceClient(w.kubelet).
			PullImage(ctx, &runtimeapi.PullImageRequest{Image: &runtimeapi.ImageSpec{Image: "big"}})
		slow <- err
	}()
	go func() {
		_, err := runtimeapi.NewRuntimeServiceClient(w.kubelet).
			StopContainer(ctx, &runtimeapi.StopContainerRequest{ContainerId: "b", Timeout: 30})
		slow <- err
	}()
	<-w.runtime.began
	<-w.runtime.began
	second := w.start()
	at = w.awaitAnother(at)
	f.await(t, 20)
	f.awaitStreams(t, 2)
	third := w.start()
	w.awaitAnother(at)
	f.await(t, 20)
	f.awaitStreams(t, 3)
	if code := second.code(t); code != takenOverCode {
		t.Errorf("the second process ended with code %d, want %d", code, takenOverCode)
	}
	select {
	case err := <-slow:
		t.Fatalf("a slow call is over: %v", err)
	case <-first.ended:
		t.Fatal("the first process has ended in the middle of slow calls")
	default:
	}
	close(w.runtime.release)
	for range 2 {
		if err := <-slow; err != nil {
			t.Errorf("slow call: %v", err)
		}
	}
	if code := first.code(t); code != takenOverCode {
		t.Errorf("the first process ended with code %d, want %d", code, takenOverCode)
	}
	f.await(t, 20)
	f.end(t)
	if n := f.streams.Load(); n != 3 {
		t.Errorf("%d event streams, want one for each process", n)
	}
	if err := third.cmd.Process.Signal(unix.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if code := third.code(t); code != 0 {
		t.Errorf("the last process ended with code %d", code)
	}
}

// An upgrade of cri-proxy does not need the runtime: the next process waits for it in vain, and
// then asks.
func TestTakeoverWhileTheRuntimeIsAway(t *testing.T) {
	w := newTwins(t)
	first := w.start()
	at := w.serving()
	w.runtime.server.Stop()
	w.start()
	w.awaitAnother(at)
	if code := first.code(t); code != takenOverCode {
		t.Errorf("the first process ended with code %d, want %d", code, takenOverCode)
	}
}

// A socket that another process has made block is left all the same, though nobody comes any more.
func TestSharedSocketThatBlocks(t *testing.T) {
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(t.TempDir(), "s"), Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	f, err := l.File()
	if err != nil {
		t.Fatal(err)
	}
	log, _ := logtest.NewNullLogger()
	s := &sockets{log: log, passed: map[string][]*os.File{admin: {f}}, used: map[string]bool{}}
	defer func() { _ = s.close() }()
	passed, err := s.listen(admin, l.Addr().String(), nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.SetNonblock(int(f.Fd()), false); err != nil {
		t.Fatal(err)
	}
	over := make(chan error, 1)
	go func() {
		_, err := passed.Accept()
		over <- err
	}()
	select {
	case err := <-over:
		t.Fatalf("accepted: %v", err)
	case <-time.After(20 * time.Millisecond):
	}
	if err := passed.Close(); err != nil {
		t.Error(err)
	}
	select {
	case err := <-over:
		if !errors.Is(err, net.ErrClosed) {
			t.Error(err)
		}
	case <-time.After(deadline):
		t.Error("it waits for the next connection")
	}
}

// A call that needs the state to its end is waited for; others are not held meanwhile.
func TestTakeoverWaitsForCallsThatNeedTheState(t *testing.T) {
	w := newTwins(t)
	first := w.start()
	at := w.serving()
	f := w.traffic()
	removed := make(chan error, 1)
	ctx := w.ctx()
	go func() {
		_, err := runtimeapi.NewRuntimeServiceClient(w.kubelet).
			RemoveContainer(ctx, &runtimeapi.RemoveContainerRequest{ContainerId: "b"})
		removed <- err
	}()
	<-w.runtime.began
	conn := w.ask()
	m, err := conn.Receive()
	if err != nil || !strings.Contains(m.Waiting, "RemoveContainer") {
		t.Fatalf("%+v, %v", m, err)
	}
	f.await(t, 20)
	conn.Close()
	if !w.serving().Equal(at) {
		t.Error("another process serves")
	}
	second := w.start()
	close(w.runtime.release)
	if err := <-removed; err != nil {
		t.Error(err)
	}
	w.awaitAnother(at)
	if code := first.code(t); code != takenOverCode {
		t.Errorf("the first process ended with code %d, want %d", code, takenOverCode)
	}
	f.await(t, 20)
	f.end(t)
	_ = second
}

// ask is a successor that gets no further than that.
func (w *twins) ask() *takeover.Conn {
	w.t.Helper()
	conn, err := takeover.Dial(w.ctx(), w.c.StateDir)
	if err != nil || conn == nil {
		w.t.Fatalf("%v, %v", conn, err)
	}
	w.t.Cleanup(func() { conn.Close() })
	if err := conn.Send(takeover.Message{Want: takeover.WantState, Version: "test"}); err != nil {
		w.t.Fatal(err)
	}
	return conn
}

// asSuccessor is set in a process that asks for the state in the directory that it names, and does
// nothing with it.
const asSuccessor = "CRI_PROXY_TEST_SUCCESSOR"

// successor falls or hangs with the state in its hands, or falls after it has moved the state away,
// or has told the process before to end.
func successor(dir, how string) error {
	conn, err := takeover.Dial(context.Background(), dir)
	if err != nil || conn == nil {
		return errors.Join(err, errors.New("nobody there"))
	}
	if err := conn.Send(takeover.Message{Want: takeover.WantState, Version: "test"}); err != nil {
		return err
	}
	for {
		m, err := conn.Receive()
		switch {
		case err != nil:
			return err
		case m.Granted == nil:
			continue
		}
		switch how {
		case "hangs":
			select {} // until killed
		case "spoils":
			if err := os.Rename(dir, dir+".away"); err != nil {
				return err
			}
		case "ends":
			pid, err := conn.PID()
			if err != nil {
				return err
			}
			if err := unix.Kill(pid, unix.SIGTERM); err != nil {
				return err
			}
		}
		os.Exit(3)
	}
}

// A successor that falls over, or hangs, with the state in its hands: the first process serves on,
// and no call fails.
func TestTakeoverGoesBack(t *testing.T) {
	for how, code := range map[string]int{"falls": 3, "hangs": -1} {
		t.Run(how, func(t *testing.T) {
			t.Parallel()
			w := newTwins(t)
			w.start()
			at := w.serving()
			f := w.traffic()
			f.await(t, 20)
			cmd := exec.CommandContext(w.ctx(), "/proc/self/exe", how)
			cmd.Env = append(os.Environ(), asSuccessor+"="+w.c.StateDir)
			_ = cmd.Run()
			if got := cmd.ProcessState.ExitCode(); got != code {
				t.Errorf("the successor ended with code %d, want %d", got, code)
			}
			f.await(t, 20)
			if !w.serving().Equal(at) {
				t.Error("another process serves")
			}
			// And once more, with a good one.
			w.start()
			w.awaitAnother(at)
			f.await(t, 20)
			f.end(t)
		})
	}
}

// fallSuccessor runs a successor that falls.
func (w *twins) fallSuccessor(how string) {
	w.t.Helper()
	cmd := exec.CommandContext(w.ctx(), "/proc/self/exe", how)
	cmd.Env = append(os.Environ(), asSuccessor+"="+w.c.StateDir)
	if out, _ := cmd.CombinedOutput(); cmd.ProcessState.ExitCode() != 3 {
		w.t.Fatalf("the successor: %s: %s", cmd.ProcessState, out)
	}
}

// The first process cannot take the state back: it does not keep kubelet's calls until its own end,
// which does not wait for them either, and the next process answers them.
func TestTakeoverCannotGoBack(t *testing.T) {
	w := newTwins(t)
	w.args = []string{"--drain-timeout=1h"}
	first := w.start()
	w.serving()
	f := w.traffic()
	f.await(t, 20)
	w.fallSuccessor("spoils")
	if code := first.code(t); code != 1 {
		t.Errorf("the first process ended with code %d, want 1", code)
	}
	if err := os.Rename(w.c.StateDir+".away", w.c.StateDir); err != nil {
		t.Fatal(err)
	}
	second := w.start()
	w.serving()
	f.await(t, 20)
	f.stop()
	f.owned.Wait()
	for _, failure := range f.failures {
		if !strings.Contains(failure, "code = Unavailable") {
			t.Error(failure)
		}
	}
	if err := second.cmd.Process.Signal(unix.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if code := second.code(t); code != 0 {
		t.Errorf("the second process ended with code %d", code)
	}
}

// The first process is told to end while the other one has the state, which does not come to serve:
// it takes the state back, answers what it has, and ends as if nothing had been.
func TestTakeoverGoesBackAtTheEnd(t *testing.T) {
	w := newTwins(t)
	w.args = []string{"--metrics-address=localhost:0"} // which this process listens on by itself
	first := w.start()
	w.serving()
	w.fallSuccessor("ends")
	if code := first.code(t); code != 0 {
		t.Errorf("the process ended with code %d", code)
	}
}

func TestRedial(t *testing.T) {
	w := newTwins(t)
	w.start()
	at := w.serving()
	f := w.traffic()
	f.await(t, 20)
	for n := range int64(3) {
		f.awaitStreams(t, n+1)
		if there, err := takeover.Redial(w.ctx(), w.c.StateDir); err != nil || !there {
			t.Fatalf("%v, %v", there, err)
		}
		f.await(t, 20)
	}
	f.awaitStreams(t, 4)
	f.end(t)
	if !w.serving().Equal(at) {
		t.Error("another process serves")
	}
	if n := f.streams.Load(); n != 4 {
		t.Errorf("%d event streams, want 4", n)
	}
	if there, err := takeover.Redial(w.ctx(), t.TempDir()); err != nil || there {
		t.Errorf("without a process: %v, %v", there, err)
	}
}
