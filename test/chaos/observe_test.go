// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package chaos

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/types/known/emptypb"
	corev1 "k8s.io/api/core/v1"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/test/chaos/invariant"
)

// observe collects the facts about a pod's slot, all but those about the operation.
func (c *cluster) observe(ctx context.Context, pod string) (*invariant.Facts, error) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	f := &invariant.Facts{Neighbours: map[string]invariant.Status{}}
	for _, name := range []string{pod, witness} {
		p := &corev1.Pod{}
		if err := c.api.Get(ctx, client.ObjectKey{Namespace: namespace, Name: name}, p); err != nil {
			return nil, err
		}
		for _, s := range p.Status.ContainerStatuses {
			_, id, _ := strings.Cut(s.ContainerID, "://")
			st := invariant.Status{ID: id, Restarts: s.RestartCount, Running: s.State.Running != nil}
			if name == pod && s.Name == slotName {
				f.API = st
			} else {
				f.Neighbours[name+"/"+s.Name] = st
			}
		}
		if name == pod {
			f.PodUID, f.PodIP, f.Phase = string(p.UID), p.Status.PodIP, string(p.Status.Phase)
			f.Image = p.Spec.Containers[0].Image // the slot's: see podNamed
		}
	}
	var errs []error
	note := func(err error) { errs = append(errs, err) }
	note(c.onRuntime(func(conn *grpc.ClientConn) (err error) {
		var pairs [2]error
		f.Runtime, pairs[0] = listSlot(ctx, conn, f.PodUID)
		f.Leases, pairs[1] = leases(ctx, conn)
		return errors.Join(pairs[:]...)
	}))
	conn, err := c.bed.DialCRI()
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	f.Proxy, err = listSlot(ctx, conn, f.PodUID)
	note(err)

	f.Gates, err = names(filepath.Join(c.disk.state(), "gates"))
	note(err)
	f.CDI, err = names(c.cdi())
	note(err)
	f.Fifos, err = fifos(c.disk.state())
	note(err)
	f.Mounts, err = mounts(c.bed.RunDir, c.bed.NodeDir)
	note(err)
	f.Processes, err = c.strays(f)
	note(err)
	f.Logs, err = logs(filepath.Join(c.bed.PodLogs, fmt.Sprintf("%s_%s_%s", namespace, pod, f.PodUID), slotName))
	note(err)
	f.Links, err = links(pod)
	note(err)
	f.Starts, err = lines(filepath.Join(c.volume(f.PodUID), "starts"))
	note(err)
	f.Overlaps, err = lines(filepath.Join(c.volume(f.PodUID), "overlaps"))
	note(err)
	note(c.calls.read())
	f.Created = slices.Clone(c.calls.created[f.PodUID])
	return f, errors.Join(errs...)
}

func (c *cluster) onRuntime(f func(*grpc.ClientConn) error) error {
	conn, err := c.bed.DialRuntime()
	if err != nil {
		return err
	}
	defer conn.Close()
	return f(conn)
}

// onOps calls the proxy's command socket. A connection of its own each time: the socket is another
// one after each start.
func (c *cluster) onOps(f func(opsv1.OpsClient) error) error {
	return c.onNode(func(conn *grpc.ClientConn) error { return f(opsv1.NewOpsClient(conn)) })
}

func (c *cluster) onNode(f func(*grpc.ClientConn) error) error {
	conn, err := grpc.NewClient("unix://"+c.bed.AdminSocket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return err
	}
	defer conn.Close()
	return f(conn)
}

func listSlot(ctx context.Context, conn *grpc.ClientConn, podUID string) ([]invariant.Container, error) {
	list, err := runtimeapi.NewRuntimeServiceClient(conn).
		ListContainers(ctx, &runtimeapi.ListContainersRequest{Filter: &runtimeapi.ContainerFilter{
			LabelSelector: map[string]string{"io.kubernetes.pod.uid": podUID, "io.kubernetes.container.name": slotName},
		}})
	var out []invariant.Container
	for _, x := range list.GetContainers() {
		out = append(out, invariant.Container{ID: x.GetId(), Sandbox: x.GetPodSandboxId(),
			Attempt: x.GetMetadata().GetAttempt(), State: x.GetState(), Image: x.GetImage().GetUserSpecifiedImage()})
	}
	return out, err
}

// expires is the label of a lease that ends by itself (containerd's core/leases, WithExpiration): a
// containerd that is killed in the middle of a CreateContainer leaves one of its own.
const expires = "containerd.io/gc.expire"

// leases returns the IDs of containerd's leases of Kubernetes that stay for good. Its API is no
// dependency of this module, and one field of one message (ListResponse.leases[].id, both number 1)
// is no reason to make it one.
func leases(ctx context.Context, conn *grpc.ClientConn) ([]string, error) {
	ctx = metadata.AppendToOutgoingContext(ctx, "containerd-namespace", "k8s.io")
	resp := &emptypb.Empty{}
	if err := conn.Invoke(ctx, "/containerd.services.leases.v1.Leases/List", &emptypb.Empty{}, resp); err != nil {
		return nil, err
	}
	list, err := fieldOne(resp.ProtoReflect().GetUnknown())
	if err != nil {
		return nil, err
	}
	var out []string
	for _, l := range list {
		if bytes.Contains(l, []byte(expires)) {
			continue
		}
		ids, err := fieldOne(l)
		if err != nil {
			return nil, err
		}
		for _, id := range ids {
			out = append(out, string(id))
		}
	}
	return out, nil
}

// fieldOne returns the values of field 1 of an encoded message, which are bytes.
func fieldOne(b []byte) ([][]byte, error) {
	var out [][]byte
	for len(b) > 0 {
		number, kind, tag := protowire.ConsumeTag(b)
		n := protowire.ConsumeFieldValue(number, kind, b[max(tag, 0):])
		if tag < 0 || n < 0 {
			return nil, protowire.ParseError(min(tag, n))
		}
		if number == 1 && kind == protowire.BytesType {
			v, _ := protowire.ConsumeBytes(b[tag:])
			out = append(out, v)
		}
		b = b[tag+n:]
	}
	return out, nil
}

// names lists a directory; none if it does not exist.
func names(dir string) ([]string, error) {
	entries, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	var out []string
	for _, e := range entries {
		out = append(out, e.Name())
	}
	return out, nil
}

// fifos lists the named pipes below a directory.
func fifos(dir string) ([]string, error) {
	var out []string
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		switch {
		case errors.Is(err, fs.ErrNotExist):
			return nil // gone meanwhile
		case err == nil && d.Type()&fs.ModeNamedPipe != 0:
			out = append(out, path)
		}
		return err
	})
	return out, err
}

// mounts lists the mount points below the directories (proc_pid_mountinfo(5)).
func mounts(dirs ...string) ([]string, error) {
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	var out []string
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); len(f) > 4 &&
			slices.ContainsFunc(dirs, func(d string) bool { return strings.HasPrefix(f[4], d+"/") }) {
			out = append(out, f[4])
		}
	}
	return out, nil
}

// strays lists processes of the slot or its pod that should not be there: in the cgroup of a
// container that does not run, not past runc's own start, or a runc that works on a container of
// the slot.
func (c *cluster) strays(f *invariant.Facts) ([]string, error) {
	idle := map[string]bool{} // containers of the slot that do not run
	slot := map[string]bool{}
	for _, x := range f.Runtime {
		slot[x.ID] = true
		idle[x.ID] = x.State != runtimeapi.ContainerState_CONTAINER_RUNNING
	}
	dirs, err := os.ReadDir("/proc")
	if err != nil {
		return nil, err
	}
	var out []string
	for _, d := range dirs {
		if _, err := strconv.Atoi(d.Name()); err != nil {
			continue
		}
		cmdline, err := os.ReadFile(filepath.Join("/proc", d.Name(), "cmdline"))
		if err != nil || len(cmdline) == 0 {
			continue // gone meanwhile, or the kernel's
		}
		args := strings.Split(strings.TrimRight(string(cmdline), "\x00"), "\x00")
		say := func(why string) { out = append(out, fmt.Sprintf("%s %q: %s", d.Name(), args, why)) }
		runc := filepath.Base(args[0]) == "runc"
		if probe := slices.Contains(args, "exec"); runc && !probe &&
			slices.ContainsFunc(args, func(a string) bool { return slot[a] }) {
			say("runc at work")
			continue
		}
		cgroups, err := os.ReadFile(filepath.Join("/proc", d.Name(), "cgroup"))
		if err != nil {
			continue
		}
		of, ok := containerOf(string(cgroups), f.PodUID)
		switch {
		case !ok:
		case runc && !slices.Contains(args, "exec"):
			say("container not started")
		case idle[of]:
			say("container does not run")
		case slices.ContainsFunc(args, func(a string) bool { return strings.Contains(a, "gate") }):
			say("waits at a gate")
		}
	}
	return out, nil
}

// containerOf returns the container whose cgroup (proc_pid_cgroup(5)) is one of the pod's.
func containerOf(cgroups, podUID string) (string, bool) {
	for line := range strings.Lines(cgroups) {
		if _, rest, ok := strings.Cut(strings.TrimSpace(line), "/pod"+podUID+"/"); ok {
			return strings.Split(rest, "/")[0], true
		}
	}
	return "", false
}

// logs returns the attempts that have a log file.
func logs(dir string) ([]uint32, error) {
	files, err := names(dir)
	var out []uint32
	for _, f := range files {
		n, err := strconv.ParseUint(strings.Split(f, ".")[0], 10, 32)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", dir, err)
		}
		out = append(out, uint32(n))
	}
	return out, err
}

// links returns the container IDs in the names of the slot's links for log shippers.
func links(pod string) ([]string, error) {
	prefix := fmt.Sprintf("/var/log/containers/%s_%s_%s-", pod, namespace, slotName)
	files, err := filepath.Glob(prefix + "*.log")
	var out []string
	for _, f := range files {
		out = append(out, strings.TrimSuffix(strings.TrimPrefix(f, prefix), ".log"))
	}
	return out, err
}

// lines counts a file's lines; 0 if there is none.
func lines(path string) (int, error) {
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return 0, nil
	}
	return bytes.Count(b, []byte("\n")), err
}

// callLog follows the file in which the proxy records kubelet's calls.
type callLog struct {
	path    string
	at      int64
	lists   int                 // ListPodSandbox calls: kubelet's relist begins with one
	created map[string][]uint32 // attempts by pod UID, of the slot
}

// read takes in what is new.
func (l *callLog) read() error {
	f, err := os.Open(l.path)
	if err != nil {
		return err
	}
	defer f.Close()
	b, err := io.ReadAll(io.NewSectionReader(f, l.at, 1<<30))
	if err != nil {
		return err
	}
	end := bytes.LastIndexByte(b, '\n') + 1
	l.at += int64(end)
	for line := range bytes.Lines(b[:end]) {
		if bytes.Contains(line, []byte("/ListPodSandbox\"")) {
			l.lists++
		}
		if !bytes.Contains(line, []byte("/CreateContainer\"")) {
			continue
		}
		var call struct {
			Code, Container, PodUID string
			Attempt                 *uint32
		}
		if json.Unmarshal(line, &call) != nil {
			continue // of a process that was killed while it wrote
		}
		if call.Code != "OK" || call.Container != slotName || call.Attempt == nil {
			continue
		}
		if l.created == nil {
			l.created = map[string][]uint32{}
		}
		l.created[call.PodUID] = append(l.created[call.PodUID], *call.Attempt)
	}
	return nil
}

// relisted returns when kubelet has listed the pods at least n more times.
func (c *cluster) relisted(ctx context.Context, n int) error {
	if err := c.calls.read(); err != nil {
		return err
	}
	enough := c.calls.lists + n
	return eventually(ctx, 30*time.Second, func() error {
		if err := c.calls.read(); err != nil {
			return err
		}
		if c.calls.lists < enough {
			return fmt.Errorf("kubelet has listed the pods %d times, waiting for %d", c.calls.lists, enough)
		}
		return nil
	})
}
