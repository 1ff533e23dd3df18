// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package interceptors_test

import (
	"context"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cri-proxy/cri-proxy/interceptors/view"
)

const (
	methodExecSync = runtimeapi.RuntimeService_ExecSync_FullMethodName
	methodReopen   = runtimeapi.RuntimeService_ReopenContainerLog_FullMethodName
)

// Calls that need the container's process: pass while it lives, Unavailable once it is
// gone behind the mask, and the hidden one is unknown.
func TestCallsIntoContainers(t *testing.T) {
	gone := status.Error(codes.Unknown, "container is in CONTAINER_EXITED state")
	calls := []struct {
		method string
		req    func(id string) proto.Message
		resp   proto.Message
	}{
		{
			methodExecSync, func(id string) proto.Message { return &runtimeapi.ExecSyncRequest{ContainerId: id} },
			&runtimeapi.ExecSyncResponse{Stdout: []byte("x")},
		},
		{
			runtimeapi.RuntimeService_Exec_FullMethodName,
			func(id string) proto.Message { return &runtimeapi.ExecRequest{ContainerId: id} },
			&runtimeapi.ExecResponse{Url: "http://127.0.0.1:1/exec/t"},
		},
		{
			runtimeapi.RuntimeService_Attach_FullMethodName,
			func(id string) proto.Message { return &runtimeapi.AttachRequest{ContainerId: id} },
			&runtimeapi.AttachResponse{Url: "http://127.0.0.1:1/attach/t"},
		},
		{
			runtimeapi.RuntimeService_CheckpointContainer_FullMethodName,
			func(id string) proto.Message { return &runtimeapi.CheckpointContainerRequest{ContainerId: id} },
			&runtimeapi.CheckpointContainerResponse{},
		},
		{
			methodReopen,
			func(id string) proto.Message { return &runtimeapi.ReopenContainerLogRequest{ContainerId: id} },
			&runtimeapi.ReopenContainerLogResponse{},
		},
	}
	for _, c := range calls {
		name := c.method[strings.LastIndexByte(c.method, '/')+1:]
		deadMasked := codes.Unavailable
		if c.method == methodReopen {
			deadMasked = codes.OK // nothing to reopen; an error would make kubelet try again
		}
		cases := []struct {
			name string
			id   string
			err  error // of the runtime
			code codes.Code
			asks bool
		}{
			{"another one", web, nil, codes.OK, true},
			{"another one, stopped", web, gone, codes.Unknown, true},
			{"masked and alive", incumbent, nil, codes.OK, true},
			{"masked and dead", incumbent, gone, deadMasked, true},
			{"masked and dead, by prefix", incumbent[:4], gone, deadMasked, true},
			{"runtime away", incumbent, status.Error(codes.Unavailable, "dial"), deadMasked, true},
			{"hidden", successor, nil, codes.NotFound, false},
			{"hidden, by prefix", successor[:4], nil, codes.NotFound, false},
		}
		for _, tc := range cases {
			t.Run(name+" "+tc.name, func(t *testing.T) {
				b := newBed(t)
				claim := b.swapping()
				defer claim.Release()
				b.on(c.method, always(withUnknown(proto.Clone(c.resp)), tc.err))
				out, err := b.raw(t.Context(), c.method, marshal(t, withUnknown(c.req(tc.id))))
				wantCode(t, err, tc.code)
				if (b.called() != "") != tc.asks {
					t.Errorf("the runtime saw %q", b.called())
				}
				if err == nil && tc.err == nil {
					m := c.resp.ProtoReflect().New().Interface()
					if err := proto.Unmarshal(out, m); err != nil || !proto.Equal(m, withUnknown(proto.Clone(c.resp))) {
						t.Errorf("got %v, %v; want the runtime's answer", m, err)
					}
				}
			})
		}
	}
}

// An exec probe must not count a failure that the restart has caused.
func TestExecProbesDuringTheMask(t *testing.T) {
	for _, tc := range []struct {
		name string
		id   string
		exit int32
		err  error
		code codes.Code
	}{
		{"healthy", incumbent, 0, nil, codes.OK},
		{"fails behind the mask", incumbent, 137, nil, codes.Unavailable},
		{"fails elsewhere", web, 1, nil, codes.OK},
	} {
		t.Run(tc.name, func(t *testing.T) {
			b := newBed(t)
			c := b.swapping()
			defer c.Release()
			b.on(methodExecSync, always(&runtimeapi.ExecSyncResponse{ExitCode: tc.exit}, tc.err))
			resp, err := call[runtimeapi.ExecSyncResponse](
				t.Context(), b, methodExecSync, &runtimeapi.ExecSyncRequest{ContainerId: tc.id},
			)
			wantCode(t, err, tc.code)
			if err == nil && resp.GetExitCode() != tc.exit {
				t.Errorf("exit code %d", resp.GetExitCode())
			}
		})
	}
	t.Run("before the mask", func(t *testing.T) {
		b := newBed(t)
		c := b.claimed()
		defer c.Release()
		c.HideNow(token)
		c.Staged(successor)
		b.on(methodExecSync, always(&runtimeapi.ExecSyncResponse{ExitCode: 1}, nil))
		resp, err := call[runtimeapi.ExecSyncResponse](
			t.Context(), b, methodExecSync, &runtimeapi.ExecSyncRequest{ContainerId: incumbent},
		)
		if err != nil || resp.GetExitCode() != 1 {
			t.Errorf("got %v, %v: a failing probe of a container not touched yet must count", resp, err)
		}
	})
}

// A probe may have begun when there was no operation: the stop that ends it is ours all the same.
func TestExecProbeFromBeforeTheOperation(t *testing.T) {
	for _, tc := range []struct {
		name string
		id   string
		mask bool
		code codes.Code
	}{
		{"killed behind the mask", incumbent, true, codes.Unavailable},
		{"fails by itself before it", incumbent, false, codes.OK},
		{"in another container", web, true, codes.OK},
	} {
		t.Run(tc.name, func(t *testing.T) {
			b := newBed(t)
			arrived, gate := make(chan struct{}), make(chan struct{})
			b.on(methodExecSync, func(context.Context, []byte) (proto.Message, error) {
				close(arrived)
				<-gate
				return &runtimeapi.ExecSyncResponse{ExitCode: 137}, nil
			})
			answered := later(func() error {
				req := &runtimeapi.ExecSyncRequest{ContainerId: tc.id}
				_, err := call[runtimeapi.ExecSyncResponse](t.Context(), b, methodExecSync, req)
				return err
			})
			<-arrived
			c := b.claimed()
			defer c.Release()
			if err := c.Hide(t.Context(), token); err != nil {
				t.Fatal(err)
			}
			c.Staged(successor)
			if tc.mask {
				c.Mask()
			}
			close(gate)
			wantCode(t, <-answered, tc.code)
		})
	}
}

// What cannot be decoded is passed by the proxy; no interceptor may answer for it.
func TestBytesThatCannotBeDecoded(t *testing.T) {
	garbage := []byte{0x0a, 0xff}
	b := newBed(t)
	c := b.swapping()
	defer c.Release()
	for _, m := range unaryMethods() {
		take := b.director.Unary(m)
		if take == nil {
			continue
		}
		t.Run(m[strings.LastIndexByte(m, '/')+1:], func(t *testing.T) {
			asked := 0
			_, err := take(t.Context(), m, garbage, func(context.Context, []byte) ([]byte, error) {
				asked++
				return garbage, nil
			})
			wantPass(t, err)
			if asked > 1 {
				t.Errorf("the runtime was asked %d times", asked)
			}
			// The answer alone is garbage. An update and a removal read none.
			if strings.HasPrefix(m, "/runtime.v1.RuntimeService/List") ||
				strings.HasSuffix(m, "Status") || strings.HasSuffix(m, "CreateContainer") {
				_, err := take(t.Context(), m, nil, func(context.Context, []byte) ([]byte, error) {
					return garbage,
						nil
				})
				wantPass(t, err)
			}
		})
	}
	for _, m := range streamMethods() {
		if b.director.Stream(m) == nil {
			continue
		}
		t.Run(m[strings.LastIndexByte(m, '/')+1:], func(t *testing.T) {
			_, filter, err := b.director.Stream(m)(t.Context(), m, nil)
			if err != nil {
				t.Fatal(err)
			}
			defer filter.Close()
			_, err = filter.Message(garbage)
			wantPass(t, err)
		})
	}
	if b.view.Claimed(view.Slot{}) {
		t.Error("a claim is left")
	}
}

func unaryMethods() []string {
	var out []string
	for _, m := range runtimeapi.RuntimeService_ServiceDesc.Methods {
		out = append(out, "/runtime.v1.RuntimeService/"+m.MethodName)
	}
	for _, m := range runtimeapi.ImageService_ServiceDesc.Methods {
		out = append(out, "/runtime.v1.ImageService/"+m.MethodName)
	}
	return out
}

func streamMethods() []string {
	var out []string
	for _, m := range runtimeapi.RuntimeService_ServiceDesc.Streams {
		out = append(out, "/runtime.v1.RuntimeService/"+m.StreamName)
	}
	return out
}
