// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"sync"
	"time"

	sddaemon "github.com/coreos/go-systemd/v22/daemon"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "standin:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	if len(args) != 3 {
		return errors.New("want: runtime|kubelet SOCKET DIR")
	}
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGTERM)
	defer stop()
	switch args[0] {
	case "runtime":
		return serveRuntime(ctx, args[1], args[2])
	case "kubelet":
		return kubelet(ctx, args[1], args[2])
	}
	return fmt.Errorf("%q is neither runtime nor kubelet", args[0])
}

// slowRuntime pulls until the file "release" is in dir. While it does, the file "pulling" is there.
type slowRuntime struct {
	runtimeapi.UnimplementedRuntimeServiceServer
	runtimeapi.UnimplementedImageServiceServer
	dir string
}

func (*slowRuntime) Version(context.Context, *runtimeapi.VersionRequest) (*runtimeapi.VersionResponse, error) {
	return &runtimeapi.VersionResponse{Version: "0.1.0", RuntimeName: "standin", RuntimeVersion: "1",
		RuntimeApiVersion: "v1"}, nil
}

func (*slowRuntime) ListContainers(
	context.Context, *runtimeapi.ListContainersRequest,
) (*runtimeapi.ListContainersResponse, error) {
	return &runtimeapi.ListContainersResponse{
		Containers: []*runtimeapi.Container{{Id: "a", State: runtimeapi.ContainerState_CONTAINER_RUNNING}}}, nil
}

func (*slowRuntime) ContainerStatus(
	_ context.Context, req *runtimeapi.ContainerStatusRequest,
) (*runtimeapi.ContainerStatusResponse, error) {
	return &runtimeapi.ContainerStatusResponse{Status: &runtimeapi.ContainerStatus{Id: req.GetContainerId()}}, nil
}

func (r *slowRuntime) PullImage(
	ctx context.Context, req *runtimeapi.PullImageRequest,
) (*runtimeapi.PullImageResponse, error) {
	if err := os.WriteFile(filepath.Join(r.dir, "pulling"), nil, 0o600); err != nil {
		return nil, err
	}
	err := poll(ctx, func() bool {
		_, err := os.Stat(filepath.Join(r.dir, "release"))
		return err == nil
	})
	return &runtimeapi.PullImageResponse{ImageRef: req.GetImage().GetImage()}, err
}

func (*slowRuntime) GetContainerEvents(
	_ *runtimeapi.GetEventsRequest, s grpc.ServerStreamingServer[runtimeapi.ContainerEventResponse],
) error {
	if err := s.Send(&runtimeapi.ContainerEventResponse{ContainerId: "a"}); err != nil {
		return err
	}
	<-s.Context().Done()
	return s.Context().Err()
}

func serveRuntime(ctx context.Context, socket, dir string) error {
	if err := os.MkdirAll(filepath.Dir(socket), 0o711); err != nil {
		return err
	}
	_ = os.Remove(socket)
	l, err := net.Listen("unix", socket)
	if err != nil {
		return err
	}
	s := grpc.NewServer()
	r := &slowRuntime{dir: dir}
	runtimeapi.RegisterRuntimeServiceServer(s, r)
	runtimeapi.RegisterImageServiceServer(s, r)
	if _, err := sddaemon.SdNotify(false, sddaemon.SdNotifyReady); err != nil {
		return err
	}
	defer context.AfterFunc(ctx, s.Stop)()
	return s.Serve(l)
}

// poll asks until is says so or ctx ends.
func poll(ctx context.Context, is func() bool) error {
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for !is() {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return nil
}

// failure is a call that failed, or the end of an event stream.
type failure struct {
	What  string    `json:"what"`
	Began time.Time `json:"began"`
	Ended time.Time `json:"ended"`
	Error string    `json:"error"`
}

// report is what the file kubelet.json tells.
type report struct {
	Started  time.Time     `json:"started"`
	Calls    int           `json:"calls"`
	Failures []failure     `json:"failures"`
	Slowest  time.Duration `json:"slowest"` // of the short calls
	Streams  int           `json:"streams"` // event streams opened
	// StreamEnded is when the end of the last one was seen, which is after that of its connection:
	// calls that begin later go elsewhere.
	StreamEnded time.Time `json:"streamEnded"`
	// Pulls are asked for by the file "pull", which is taken away.
	PullsDone int `json:"pullsDone"`
}

// load is what kubelet does.
type load struct {
	mu sync.Mutex // guards r
	r  report
}

func (l *load) change(f func(*report)) {
	l.mu.Lock()
	defer l.mu.Unlock()
	f(&l.r)
}

// call counts one call.
func (l *load) call(what string, short bool, f func() error) {
	began := time.Now()
	err := f()
	l.change(func(r *report) {
		r.Calls++
		if short {
			r.Slowest = max(r.Slowest, time.Since(began))
		}
		if err != nil {
			r.Failures = append(r.Failures, failure{what, began, time.Now(), err.Error()})
		}
	})
}

// callers and callEvery make 200 short calls a second.
const (
	callers   = 8
	callEvery = 40 * time.Millisecond
	// callTimeout is kubelet's runtimeRequestTimeout.
	callTimeout = 2 * time.Minute
)

// kubelet makes calls until ctx ends, and lets those under way come to their end.
func kubelet(ctx context.Context, socket, dir string) error {
	conn, err := grpc.NewClient("passthrough:///"+socket, // all as kubelet's client
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithAuthority("localhost"),
		grpc.WithContextDialer(func(ctx context.Context, path string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", path)
		}),
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff: backoff.Config{BaseDelay: 100 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2,
				MaxDelay: 3 * time.Second},
			MinConnectTimeout: 5 * time.Second,
		}),
	)
	if err != nil {
		return err
	}
	defer conn.Close()
	l := &load{r: report{Started: time.Now()}}
	rt := runtimeapi.NewRuntimeServiceClient(conn)
	var owned sync.WaitGroup
	for i := range callers {
		owned.Go(func() { l.shortCalls(ctx, rt, i%2 == 0) })
	}
	owned.Go(func() { l.events(ctx, rt) })
	owned.Go(func() { l.pulls(ctx, runtimeapi.NewImageServiceClient(conn), dir) })
	owned.Go(func() { l.report(ctx, dir) })
	if _, err := sddaemon.SdNotify(false, sddaemon.SdNotifyReady); err != nil {
		return err
	}
	owned.Wait()
	return l.write(dir)
}

func (l *load) shortCalls(ctx context.Context, rt runtimeapi.RuntimeServiceClient, list bool) {
	tick := time.NewTicker(callEvery)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
		call, cancel := context.WithTimeout(context.WithoutCancel(ctx), callTimeout)
		if list {
			l.call("ListContainers", true, func() error {
				_, err := rt.ListContainers(call, &runtimeapi.ListContainersRequest{})
				return err
			})
		} else {
			l.call("ContainerStatus", true, func() error {
				_, err := rt.ContainerStatus(call, &runtimeapi.ContainerStatusRequest{ContainerId: "a"})
				return err
			})
		}
		cancel()
	}
}

// events keeps an event stream open. That it ends with Unavailable is how it is told to come again.
func (l *load) events(ctx context.Context, rt runtimeapi.RuntimeServiceClient) {
	for ctx.Err() == nil {
		began := time.Now()
		s, err := rt.GetContainerEvents(ctx, &runtimeapi.GetEventsRequest{})
		if err == nil {
			_, err = s.Recv()
		}
		if err != nil {
			if ctx.Err() == nil {
				l.change(func(r *report) {
					r.Failures = append(r.Failures, failure{"GetContainerEvents", began, time.Now(), err.Error()})
				})
			}
			select {
			case <-time.After(callEvery):
			case <-ctx.Done():
			}
			continue
		}
		l.change(func(r *report) { r.Streams++ })
		for err == nil {
			_, err = s.Recv()
		}
		l.change(func(r *report) { r.StreamEnded = time.Now() })
		if ctx.Err() == nil && status.Code(err) != codes.Unavailable {
			l.change(func(r *report) {
				r.Failures = append(r.Failures,
					failure{"the end of GetContainerEvents", began, time.Now(), err.Error()})
			})
		}
	}
}

func (l *load) pulls(ctx context.Context, images runtimeapi.ImageServiceClient, dir string) {
	var under sync.WaitGroup
	defer under.Wait()
	for poll(ctx, func() bool { return os.Remove(filepath.Join(dir, "pull")) == nil }) == nil {
		under.Go(func() {
			l.call("PullImage", false, func() error { // no deadline, as kubelet's
				_, err := images.PullImage(ctx,
					&runtimeapi.PullImageRequest{Image: &runtimeapi.ImageSpec{Image: "big"}})
				return err
			})
			l.change(func(r *report) { r.PullsDone++ })
		})
	}
}

// report writes the file twenty times a second.
func (l *load) report(ctx context.Context, dir string) {
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		if err := l.write(dir); err != nil {
			fmt.Fprintln(os.Stderr, "standin:", err)
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}

func (l *load) write(dir string) error {
	l.mu.Lock()
	b, err := json.Marshal(l.r)
	l.mu.Unlock()
	if err != nil {
		return err
	}
	path := filepath.Join(dir, "kubelet.json")
	if err := os.WriteFile(path+".new", b, 0o644); err != nil {
		return err
	}
	return os.Rename(path+".new", path)
}
