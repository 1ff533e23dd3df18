// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package interceptors_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/sirupsen/logrus"
	"go.uber.org/goleak"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cri-proxy/cri-proxy/interceptors"
	"github.com/cri-proxy/cri-proxy/interceptors/view"
	"github.com/cri-proxy/cri-proxy/proxy"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// The node of these tests: the slot app is being restarted, web is at rest.
const (
	sandbox   = "5b5b5b5b01"
	incumbent = "aaaa000011"
	successor = "bbbb000022"
	web       = "cccc000033"
	webBefore = "cccc000034" // shares a prefix with web
	token     = "0123456789abcdef0123456789abcdef"
)

var slot = view.Slot{PodUID: "uid-1", Container: "app"}

func labels(container string) map[string]string {
	return map[string]string{"io.kubernetes.pod.uid": "uid-1", "io.kubernetes.container.name": container}
}

// containers is the node as the runtime knows it in the middle of a swap: the incumbent
// has been stopped, the successor not started.
func containers() []*runtimeapi.Container {
	return []*runtimeapi.Container{
		{
			Id: successor, PodSandboxId: sandbox, Labels: labels("app"),
			State:       runtimeapi.ContainerState_CONTAINER_CREATED,
			Annotations: map[string]string{view.StagedAnnotation: token},
		},
		{Id: incumbent, PodSandboxId: sandbox, Labels: labels("app"),
			State: runtimeapi.ContainerState_CONTAINER_EXITED},
		{Id: web, PodSandboxId: sandbox, Labels: labels("web"), State: runtimeapi.ContainerState_CONTAINER_RUNNING},
		// A survivor of an earlier swap: it keeps the annotation and is not hidden by it.
		{
			Id: webBefore, PodSandboxId: sandbox, Labels: labels("web"),
			State:       runtimeapi.ContainerState_CONTAINER_EXITED,
			Annotations: map[string]string{view.StagedAnnotation: "ffff"},
		},
	}
}

// bed is a director over a scripted runtime.
type bed struct {
	t        testing.TB
	view     *view.View
	director *interceptors.Director
	records  *recorder

	mu     sync.Mutex // guards all following fields
	script map[string]answer
	calls  []string // method names without the service, in order
}

type answer func(ctx context.Context, req []byte) (proto.Message, error)

func newBed(t testing.TB) *bed { return newJudgedBed(t, nil) }

// judgeFunc is a Judge.
type judgeFunc func(context.Context) error

func (f judgeFunc) Judge(ctx context.Context) error { return f(ctx) }

func newJudgedBed(t testing.TB, judge interceptors.Judge) *bed {
	log := logrus.New()
	log.SetOutput(io.Discard)
	b := &bed{t: t, view: view.New(), records: &recorder{}, script: map[string]answer{}}
	b.director = interceptors.New(interceptors.Options{View: b.view, Records: b.records, Log: log, Judge: judge})
	return b
}

// claimed takes the slot and binds it, hiding nothing.
func (b *bed) claimed() *view.Claim {
	b.t.Helper()
	c, err := b.view.TryClaim(slot)
	if err != nil {
		b.t.Fatal(err)
	}
	c.Bind(sandbox, incumbent)
	return c
}

// swapping is the state of containers(): successor hidden, incumbent masked.
func (b *bed) swapping() *view.Claim {
	b.t.Helper()
	c := b.claimed()
	if err := c.Hide(b.t.Context(), token); err != nil {
		b.t.Fatal(err)
	}
	c.Staged(successor)
	c.Mask()
	return c
}

// on scripts the runtime's answer to a method.
func (b *bed) on(method string, f answer) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.script[method] = f
}

// always scripts the same answer for every call.
func always(resp proto.Message, err error) answer {
	return func(context.Context, []byte) (proto.Message, error) { return resp, err }
}

func (b *bed) next(method string) proxy.UnaryNext {
	return func(ctx context.Context, req []byte) ([]byte, error) {
		b.mu.Lock()
		b.calls = append(b.calls, method[strings.LastIndexByte(method, '/')+1:])
		f := b.script[method]
		b.mu.Unlock()
		if f == nil {
			return nil, status.Error(codes.Internal, "not scripted: "+method)
		}
		m, err := f(ctx, req)
		if err != nil {
			return nil, err
		}
		return proto.Marshal(m)
	}
}

// called returns the methods the runtime has seen, separated by blanks.
func (b *bed) called() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return strings.Join(b.calls, " ")
}

// raw does with a call what the proxy does.
func (b *bed) raw(ctx context.Context, method string, req []byte) ([]byte, error) {
	for {
		if take := b.director.Unary(method); take != nil {
			return take(ctx, method, req, b.next(method))
		}
		done, ok := b.director.Pass(method)
		if !ok {
			continue
		}
		if done != nil {
			defer done()
		}
		return b.next(method)(ctx, req)
	}
}

// call makes a typed call.
func call[R any, P interface {
	*R
	proto.Message
}](ctx context.Context, b *bed, method string, req proto.Message) (P, error) {
	b.t.Helper()
	in, err := proto.Marshal(req)
	if err != nil {
		b.t.Fatal(err)
	}
	out, err := b.raw(ctx, method, in)
	if err != nil {
		return nil, err
	}
	resp := P(new(R))
	if err := proto.Unmarshal(out, resp); err != nil {
		b.t.Fatal(err)
	}
	return resp, nil
}

// stream opens a server stream and returns its filter; it is closed with the test.
func (b *bed) stream(method string, req proto.Message) (upstream []byte, filter proxy.StreamFilter) {
	b.t.Helper()
	in, err := proto.Marshal(req)
	if err != nil {
		b.t.Fatal(err)
	}
	take := b.director.Stream(method)
	if take == nil {
		b.t.Fatalf("no interceptor for %s", method)
	}
	upstream, filter, err = take(b.t.Context(), method, in)
	if err != nil {
		b.t.Fatal(err)
	}
	b.t.Cleanup(filter.Close)
	return upstream, filter
}

// through sends one message through a filter.
func through[M proto.Message](t testing.TB, f proxy.StreamFilter, in M) []M {
	t.Helper()
	b, err := proto.Marshal(in)
	if err != nil {
		t.Fatal(err)
	}
	out, err := f.Message(b)
	if err != nil {
		t.Fatal(err)
	}
	var msgs []M
	for _, b := range out {
		m := in.ProtoReflect().New().Interface().(M)
		if err := proto.Unmarshal(b, m); err != nil {
			t.Fatal(err)
		}
		msgs = append(msgs, m)
	}
	return msgs
}

// recorder is an [interceptors.Records] that writes down what it is told.
type recorder struct {
	mu  sync.Mutex // guards all following fields
	log []string
}

func (r *recorder) add(format string, args ...any) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.log = append(r.log, fmt.Sprintf(format, args...))
}

func (r *recorder) Created(id string, req []byte) { r.add("created %s %d bytes", id, len(req)) }

func (r *recorder) Updated(id string, res []byte) {
	m := &runtimeapi.LinuxContainerResources{}
	if err := proto.Unmarshal(res, m); err != nil {
		r.add("updated %s: %v", id, err)
		return
	}
	r.add("updated %s cpus=%s", id, m.GetCpusetCpus())
}

func (r *recorder) Removed(id string) { r.add("removed %s", id) }

func (r *recorder) String() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return strings.Join(r.log, ", ")
}

// names are short names for goldens.
var names = map[string]string{incumbent: "old", successor: "new", web: "web", webBefore: "web-before", "": "-"}

func show(list []*runtimeapi.Container) string {
	var out []string
	for _, c := range list {
		out = append(out, names[c.GetId()]+" "+strings.TrimPrefix(c.GetState().String(), "CONTAINER_"))
	}
	slices.Sort(out)
	return strings.Join(out, ", ")
}

func wantCode(t *testing.T, err error, code codes.Code) {
	t.Helper()
	if status.Code(err) != code {
		t.Errorf("got %v, want code %s", err, code)
	}
}

// wantPass asserts that the interceptor declares itself unable.
func wantPass(t *testing.T, err error) {
	t.Helper()
	var pass *proxy.PassError
	if !errors.As(err, &pass) {
		t.Errorf("got %v, want a *proxy.PassError", err)
	}
}

// unknownField is a field that no CRI message has.
var unknownField = protowire.AppendString(protowire.AppendTag(nil, 4000, protowire.BytesType), "from the future")

func withUnknown[M proto.Message](m M) M {
	m.ProtoReflect().SetUnknown(unknownField)
	return m
}

func wantUnknown(t *testing.T, what string, m proto.Message) {
	t.Helper()
	if got := m.ProtoReflect().GetUnknown(); string(got) != string(unknownField) {
		t.Errorf("%s: unknown field is %q, want it kept", what, got)
	}
}
