// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package room_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/sirupsen/logrus"
	"google.golang.org/grpc"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/ops/cgroup"
	"github.com/cri-proxy/cri-proxy/ops/crinode"
	"github.com/cri-proxy/cri-proxy/ops/operation"
	"github.com/cri-proxy/cri-proxy/ops/room"
	"github.com/cri-proxy/cri-proxy/ops/store"
	"github.com/cri-proxy/cri-proxy/ops/switchover"
)

const mib = 1 << 20

// files is a pod of cgroup v2 in a tree of files, which no kernel keeps: 64 MiB, 20 of them in use,
// 15 by the old container.
type files struct {
	t    *testing.T
	root string
}

func (f *files) set(name, content string) {
	f.t.Helper()
	path := filepath.Join(f.root, name)
	if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755),
		os.WriteFile(path, []byte(content+"\n"), 0o644)); err != nil {
		f.t.Error(err)
	}
}

const pod = "sys/fs/cgroup/kubepods/podu/"

func newFiles(t *testing.T) *files {
	f := &files{t: t, root: t.TempDir()}
	f.set("proc/self/mountinfo", "30 23 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw")
	f.set("proc/meminfo", "MemTotal: 4194304 kB\nMemAvailable: 2097152 kB")
	f.set("proc/1/cgroup", "0::/kubepods/podu/old")
	f.set(pod+"memory.max", strconv.Itoa(64*mib))
	f.set(pod+"memory.current", strconv.Itoa(20*mib))
	f.set(pod+"pids.max", "1000")
	f.set(pod+"pids.current", "10")
	f.set(pod+"old/memory.current", strconv.Itoa(15*mib))
	f.set(pod+"old/pids.current", "5")
	return f
}

// limit is the pod's, in MiB.
func (f *files) limit() int {
	b, err := os.ReadFile(filepath.Join(f.root, pod+"memory.max"))
	if err != nil {
		f.t.Error(err)
	}
	n, err := strconv.Atoi(strings.TrimSpace(string(b)))
	if err != nil {
		f.t.Error(err)
	}
	return n / mib
}

// fakeRuntime has a container old that runs, and one new in some state.
type fakeRuntime struct {
	runtimeapi.RuntimeServiceClient
	next runtimeapi.ContainerState
}

func (f *fakeRuntime) ContainerStatus(
	_ context.Context, r *runtimeapi.ContainerStatusRequest, _ ...grpc.CallOption,
) (*runtimeapi.ContainerStatusResponse, error) {
	if r.GetContainerId() == "new" {
		return &runtimeapi.ContainerStatusResponse{Status: &runtimeapi.ContainerStatus{State: f.next}}, nil
	}
	return &runtimeapi.ContainerStatusResponse{
		Status: &runtimeapi.ContainerStatus{State: runtimeapi.ContainerState_CONTAINER_RUNNING},
		Info:   map[string]string{"info": `{"pid":1}`},
	}, nil
}

// fakeOperation is an operation that replaces old by new, and what it has told.
type fakeOperation struct {
	*operation.Operation
	room     *room.Room
	warnings []string
	exited   bool
}

func newOperation(t *testing.T, f *files, rt *fakeRuntime) *fakeOperation {
	t.Helper()
	log := logrus.New()
	log.SetOutput(io.Discard)
	dir := t.TempDir()
	journal, err := store.OpenJournal(dir, log)
	if err != nil {
		t.Fatal(err)
	}
	records, err := store.OpenRecords(dir, log)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := errors.Join(journal.Close(), records.Close()); err != nil {
			t.Error(err)
		}
	})
	overrides, err := store.OpenOverrides(journal, nil, log)
	if err != nil {
		t.Fatal(err)
	}
	disk := &store.Store{Journal: journal, Records: records, Overrides: overrides, Boot: "boot"}
	o := &fakeOperation{Operation: operation.New(operation.RestartCommand(&opsv1.RestartRequest{
		Uid: "op", Containers: []*opsv1.ContainerRestart{{Name: "app"}},
	}, nil), &opsv1.PodRef{Namespace: "default", Name: "shop", Uid: "uid"}, disk)}
	handle := o.Container(0)
	handle.Set(func(rec *store.Container, _ *opsv1.ContainerOperation) { rec.Incumbent, rec.Successor = "old", "new" })
	prober := switchover.NewProber(switchover.Options{StateDir: dir, Runtime: rt, Log: log})
	prober.FindPod = func(pid int, container string) (*cgroup.Pod, error) {
		return cgroup.System{Root: f.root}.Find(pid, container)
	}
	n := &room.Node{
		Runtime: &crinode.Client{Runtime: rt, Log: log}, Switchover: prober,
		Active: func() []*operation.Operation { return []*operation.Operation{o.Operation} },
	}
	o.room = n.Of(room.Container{
		Operation: o.Operation, Log: log,
		Write: func(f func(*store.Container, *opsv1.ContainerOperation)) error {
			_, err := handle.Write(f)
			return err
		},
		Note: func(f func(*store.Container, *opsv1.ContainerOperation)) {
			if _, err := handle.Note(f); err != nil {
				t.Error(err)
			}
		},
		Warn:        func(format string, args ...any) { o.warnings = append(o.warnings, fmt.Sprintf(format, args...)) },
		Exited:      func() bool { return o.exited },
		Interrupted: func() error { return nil },
	})
	return o
}

func TestRefuseGate(t *testing.T) {
	for _, tt := range []struct {
		name string
		set  func(f *files)
		want string // part of it
	}{
		{name: "there is room"},
		{
			name: "no memory", set: func(f *files) { f.set(pod+"memory.current", strconv.Itoa(50*mib)) },
			want: "the pod has 14.0 MiB of memory free (limit 64.0 MiB, 50.0 MiB used, in /kubepods/podu), " +
				"less than the 16.0 MiB that a container takes that waits at its gate",
		},
		{
			name: "no process IDs", set: func(f *files) { f.set(pod+"pids.current", "990") },
			want: "the pod has 10 process IDs free (limit 1000, 990 used, in /kubepods/podu), less than the 24 that " +
				"runc takes",
		},
		{name: "not known", set: func(f *files) { f.set("proc/1/cgroup", "nonsense") }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			f := newFiles(t)
			if tt.set != nil {
				tt.set(f)
			}
			o := newOperation(t, f, &fakeRuntime{})
			if got := o.room.RefuseGate(t.Context()); got != tt.want && (tt.want == "" ||
				!strings.Contains(got, tt.want)) {
				t.Errorf("got %q, want %q", got, tt.want)
			}
		})
	}
}

// The incumbent comes to need the memory while its successor waits at the gate.
func TestShort(t *testing.T) {
	f := newFiles(t)
	o := newOperation(t, f, &fakeRuntime{})
	if why := o.room.Short(t.Context()); why != "" {
		t.Errorf("short at first: %s", why)
	}
	f.set(pod+"memory.current", strconv.Itoa(60*mib))
	const want = "the pod has come to have 4.0 MiB of memory free"
	if why := o.room.Short(t.Context()); !strings.HasPrefix(why, want) {
		t.Errorf("got %q", why)
	}
	o.exited = true
	if why := o.room.Short(t.Context()); why != "" {
		t.Errorf("short of an incumbent that has ended: %s", why)
	}
}

// The limit is raised by what the successor may use, once, and taken back.
func TestRaise(t *testing.T) {
	need := &runtimeapi.LinuxContainerResources{MemoryLimitInBytes: 48 * mib}
	f, rt := newFiles(t), &fakeRuntime{next: runtimeapi.ContainerState_CONTAINER_CREATED}
	o := newOperation(t, f, rt)
	if !o.room.Unstarted(t.Context()) {
		t.Error("it is started")
	}
	for range 2 { // the second by a process that finds it in the journal
		if err := o.room.Raise(t.Context(), need); err != nil {
			t.Fatal(err)
		}
		if got := f.limit(); got != 64+48 {
			t.Errorf("the limit is %d MiB", got)
		}
	}
	if o.Container(0).Record().Raised == nil {
		t.Error("the journal does not have it")
	}
	if !o.room.Lower(t.Context()) || f.limit() != 64 || o.Container(0).Record().Raised != nil {
		t.Errorf("not taken back: %d MiB", f.limit())
	}
	if err := o.room.TryLower(); err != nil {
		t.Error(err)
	}
	rt.next = runtimeapi.ContainerState_CONTAINER_RUNNING
	if err := o.room.Raise(t.Context(), need); err != nil || f.limit() != 64 {
		t.Errorf("raised for one that runs: %v, %d MiB", err, f.limit())
	}
	if len(o.warnings) > 0 {
		t.Errorf("warnings %q", o.warnings)
	}
}

// The node must be able to afford two containers at once.
func TestBesideRefused(t *testing.T) {
	for _, tt := range []struct {
		name, want string
		need       *runtimeapi.LinuxContainerResources
		set        func(f *files)
	}{
		{
			name: "memory of the node", need: &runtimeapi.LinuxContainerResources{MemoryLimitInBytes: 4096 * mib},
			want: "it may use 4096.0 MiB, and outside of the pod there is 2048.0 MiB of memory free",
		},
		{
			name: "process IDs", set: func(f *files) { f.set(pod+"pids.current", "990") },
			want: "the old one has 5 processes and threads, and the pod has 10 process IDs free",
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			f := newFiles(t)
			if tt.set != nil {
				tt.set(f)
			}
			o := newOperation(t, f, &fakeRuntime{})
			err := o.room.Raise(t.Context(), tt.need)
			var out *operation.Outcome
			if !errors.As(err, &out) || out.Reason != opsv1.ReasonInsufficientResources ||
				!strings.Contains(out.Message, tt.want) {
				t.Errorf("got %v", err)
			}
			if f.limit() != 64 {
				t.Errorf("the limit is %d MiB", f.limit())
			}
		})
	}
}
