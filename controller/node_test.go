// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package controller

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/test/address"
)

// authority issues certificates for one test.
type authority struct {
	t    *testing.T
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	dir  string
}

func newAuthority(t *testing.T) *authority {
	t.Helper()
	a := &authority{t: t, dir: t.TempDir()}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test CA"}, IsCA: true, BasicConstraintsValid: true,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), KeyUsage: x509.KeyUsageCertSign,
	}
	a.key = a.newKey()
	der, err := x509.CreateCertificate(rand.Reader, template, template, &a.key.PublicKey, a.key)
	if err != nil {
		t.Fatal(err)
	}
	if a.cert, err = x509.ParseCertificate(der); err != nil {
		t.Fatal(err)
	}
	a.write("ca.crt", "CERTIFICATE", der)
	return a
}

func (a *authority) newKey() *ecdsa.PrivateKey {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		a.t.Fatal(err)
	}
	return key
}

func (a *authority) write(name, kind string, der []byte) string {
	path := filepath.Join(a.dir, name)
	if err := os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600); err != nil {
		a.t.Fatal(err)
	}
	return path
}

// issue writes a certificate for name and its key, and returns the files.
func (a *authority) issue(name string) TLSFiles {
	a.t.Helper()
	key := a.newKey()
	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: name}, DNSNames: []string{name},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth},
	}, a.cert, &key.PublicKey, a.key)
	if err != nil {
		a.t.Fatal(err)
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		a.t.Fatal(err)
	}
	return TLSFiles{
		Cert: a.write(name+".crt", "CERTIFICATE", der), Key: a.write(name+".key", "PRIVATE KEY", keyDER),
		CA: filepath.Join(a.dir, "ca.crt"),
	}
}

// testNode serves the command interface as ops does: operations by UID, one at a
// time per slot, streams of their changes. Its containers are IDs in a map.
type testNode struct {
	opsv1.UnimplementedOpsServer
	t       *testing.T
	address string
	files   TLSFiles
	server  *grpc.Server
	ended   chan struct{}
	runs    sync.WaitGroup

	// swapped is called when a container has been replaced, before the operation
	// says so.
	swapped func(podUID, container, id string, attempt int32)

	mu       sync.Mutex
	ops      map[string]*testOperation
	order    []string
	slots    map[string]chan struct{} // one token each
	current  map[string]string        // slot → container ID
	attempts map[string]int32
	holds    map[string]chan struct{} // container/phase → closed to go on
	failures map[string]*opsv1.ContainerOperation
	refuse   error
	requests []*opsv1.RestartRequest
	cancels  []string
	nextID   int
}

type testOperation struct {
	op        *opsv1.Operation
	request   *opsv1.RestartRequest
	cancelled chan string
	changed   chan struct{}
}

func newTestNode(t *testing.T, files TLSFiles) *testNode {
	n := &testNode{
		t: t, files: files, ended: make(chan struct{}), ops: map[string]*testOperation{}, slots: map[string]chan struct{}{},
		current: map[string]string{}, attempts: map[string]int32{}, holds: map[string]chan struct{}{},
		failures: map[string]*opsv1.ContainerOperation{}, swapped: func(string, string, string, int32) {},
	}
	n.address = address.Reserve(t)
	n.serve(address.Listen(t, n.address))
	t.Cleanup(func() {
		close(n.ended)
		n.server.Stop()
		n.runs.Wait()
	})
	return n
}

func (n *testNode) serve(listener net.Listener) {
	cert, err := tls.LoadX509KeyPair(n.files.Cert, n.files.Key)
	if err != nil {
		n.t.Fatal(err)
	}
	ca, err := os.ReadFile(n.files.CA)
	if err != nil {
		n.t.Fatal(err)
	}
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(ca)
	n.server = grpc.NewServer(grpc.Creds(credentials.NewTLS(&tls.Config{
		Certificates: []tls.Certificate{cert}, ClientCAs: pool, ClientAuth: tls.RequireAndVerifyClientCert, MinVersion: tls.VersionTLS13,
	})))
	opsv1.RegisterOpsServer(n.server, n)
	server := n.server
	n.runs.Go(func() { _ = server.Serve(listener) })
}

// down makes the node unreachable until the returned function is called.
func (n *testNode) down() (up func()) {
	n.server.Stop()
	return func() { n.serve(address.Listen(n.t, n.address)) }
}

// hold stops operations on the container at the phase until release.
func (n *testNode) hold(container string, at opsv1.Phase) (release func()) {
	gate := make(chan struct{})
	n.mu.Lock()
	n.holds[container+"/"+at.String()] = gate
	n.mu.Unlock()
	return sync.OnceFunc(func() { close(gate) })
}

// fail makes operations on the container end with the given account or, if that has no phase, only has its warnings told.
func (n *testNode) fail(container string, account *opsv1.ContainerOperation) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.failures[container] = account
}

func (n *testNode) run(podUID, container, id string, restarts int32) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.current[podUID+"/"+container], n.attempts[podUID+"/"+container] = id, restarts
}

func (n *testNode) id(podUID, container string) string {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.current[podUID+"/"+container]
}

func (n *testNode) operation(uid string) *opsv1.Operation {
	n.mu.Lock()
	defer n.mu.Unlock()
	if o := n.ops[uid]; o != nil {
		return proto.Clone(o.op).(*opsv1.Operation)
	}
	return nil
}

// commanded are the containers of all requests that came in, in order.
func (n *testNode) commanded() []string {
	n.mu.Lock()
	defer n.mu.Unlock()
	var names []string
	for _, r := range n.requests {
		names = append(names, r.GetContainers()[0].GetName())
	}
	return names
}

func (n *testNode) Restart(_ context.Context, req *opsv1.RestartRequest) (*opsv1.Operation, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.requests = append(n.requests, req)
	if o := n.ops[req.GetUid()]; o != nil {
		if !proto.Equal(o.request, req) {
			return nil, status.Error(codes.AlreadyExists, "another request has this UID")
		}
		return proto.Clone(o.op).(*opsv1.Operation), nil
	}
	if n.refuse != nil {
		return nil, n.refuse
	}
	want := req.GetContainers()[0]
	slot := req.GetPod().GetUid() + "/" + want.GetName()
	id, ok := n.current[slot]
	if !ok {
		return nil, status.Errorf(codes.NotFound, "no container %s", want.GetName())
	}
	if n.slots[slot] == nil {
		n.slots[slot] = make(chan struct{}, 1)
		n.slots[slot] <- struct{}{}
	}
	if expected := bareID(want.GetExpectedContainerId()); expected != "" && expected != id && !req.GetForce() {
		st, err := status.New(codes.FailedPrecondition, "container is another one now").WithDetails(&errdetails.ErrorInfo{Reason: reasonExpectedIDDiffers})
		if err != nil {
			n.t.Error(err)
		}
		return nil, st.Err()
	}
	o := &testOperation{
		request: req, cancelled: make(chan string, 1), changed: make(chan struct{}),
		op: &opsv1.Operation{
			Uid: req.GetUid(), Kind: "Restart", Pod: req.GetPod(), Requester: req.GetRequester(), CreateTime: timestamppb.Now(),
			Phase:      opsv1.Phase_PHASE_PENDING,
			Containers: []*opsv1.ContainerOperation{{Name: want.GetName(), Phase: opsv1.Phase_PHASE_PENDING}},
		},
	}
	n.ops[req.GetUid()] = o
	n.order = append(n.order, req.GetUid())
	n.runs.Go(func() { n.carryOut(o, slot, n.slots[slot]) })
	return proto.Clone(o.op).(*opsv1.Operation), nil
}

func (n *testNode) update(o *testOperation, change func(*opsv1.ContainerOperation)) {
	n.mu.Lock()
	defer n.mu.Unlock()
	c := o.op.Containers[0]
	change(c)
	o.op.Phase, o.op.Message = c.Phase, c.Message
	if c.Phase >= opsv1.Phase_PHASE_SUCCEEDED {
		o.op.FinishTime = timestamppb.Now()
	}
	close(o.changed)
	o.changed = make(chan struct{})
}

func (n *testNode) carryOut(o *testOperation, slot string, token chan struct{}) {
	cancel := func(reason string) {
		n.update(o, func(c *opsv1.ContainerOperation) { c.Phase, c.Message = opsv1.Phase_PHASE_CANCELLED, reason })
	}
	name := o.request.GetContainers()[0].GetName()
	select {
	case <-token:
		defer func() { token <- struct{}{} }()
	case reason := <-o.cancelled:
		cancel(reason)
		return
	case <-n.ended:
		return
	}
	n.mu.Lock()
	incumbent := n.current[slot]
	attempt := n.attempts[slot] + 1
	n.mu.Unlock()
	if expected := bareID(o.request.GetContainers()[0].GetExpectedContainerId()); expected != incumbent && !o.request.GetForce() {
		n.update(o, func(c *opsv1.ContainerOperation) {
			c.Phase, c.Reason, c.Message = opsv1.Phase_PHASE_FAILED, reasonExpectedIDDiffers, "container is another one now"
		})
		return
	}
	for _, phase := range []opsv1.Phase{opsv1.Phase_PHASE_STAGING, opsv1.Phase_PHASE_STOPPING, opsv1.Phase_PHASE_STARTING} {
		n.update(o, func(c *opsv1.ContainerOperation) {
			c.Phase, c.IncumbentId, c.Attempt = phase, incumbent, uint32(attempt)
			if o.request.GetContainers()[0].GetOrder() == opsv1.Order_ORDER_START_FIRST {
				c.Method = methodOverlap
			}
			if phase == opsv1.Phase_PHASE_STARTING {
				c.StopTime = timestamppb.Now()
			}
		})
		n.mu.Lock()
		gate, failure := n.holds[name+"/"+phase.String()], n.failures[name]
		n.mu.Unlock()
		if gate != nil {
			cancelled := o.cancelled
			if phase != opsv1.Phase_PHASE_STAGING {
				cancelled = nil // too late
			}
			select {
			case <-gate:
			case reason := <-cancelled:
				cancel(reason)
				return
			case <-n.ended:
				return
			}
		}
		switch {
		case failure.GetPhase() == opsv1.Phase_PHASE_UNSPECIFIED && phase == opsv1.Phase_PHASE_STARTING:
			n.update(o, func(c *opsv1.ContainerOperation) { c.Warnings = failure.GetWarnings() })
		case failure.GetPhase() != opsv1.Phase_PHASE_UNSPECIFIED:
			n.update(o, func(c *opsv1.ContainerOperation) { proto.Merge(c, failure) })
			return
		}
	}
	n.mu.Lock()
	n.nextID++
	id := fmt.Sprintf("new%d", n.nextID)
	n.current[slot], n.attempts[slot] = id, attempt
	n.mu.Unlock()
	n.swapped(o.request.GetPod().GetUid(), name, id, attempt)
	n.update(o, func(c *opsv1.ContainerOperation) {
		c.Phase, c.SuccessorId, c.StartTime = opsv1.Phase_PHASE_SUCCEEDED, id, timestamppb.Now()
		c.Gap = durationpb.New(6 * time.Millisecond)
	})
}

func (n *testNode) GetOperation(_ context.Context, req *opsv1.GetOperationRequest) (*opsv1.Operation, error) {
	if op := n.operation(req.GetUid()); op != nil {
		return op, nil
	}
	return nil, status.Error(codes.NotFound, "no such operation")
}

func (n *testNode) WatchOperation(req *opsv1.WatchOperationRequest, stream grpc.ServerStreamingServer[opsv1.Operation]) error {
	for {
		n.mu.Lock()
		o := n.ops[req.GetUid()]
		if o == nil {
			n.mu.Unlock()
			return status.Error(codes.NotFound, "no such operation")
		}
		op, changed := proto.Clone(o.op).(*opsv1.Operation), o.changed
		n.mu.Unlock()
		if err := stream.Send(op); err != nil || op.GetFinishTime() != nil {
			return err
		}
		select {
		case <-changed:
		case <-stream.Context().Done():
			return stream.Context().Err()
		}
	}
}

func (n *testNode) ListOperations(context.Context, *opsv1.ListOperationsRequest) (*opsv1.ListOperationsResponse, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	answer := &opsv1.ListOperationsResponse{}
	for _, uid := range n.order {
		answer.Operations = append(answer.Operations, proto.Clone(n.ops[uid].op).(*opsv1.Operation))
	}
	return answer, nil
}

func (n *testNode) CancelOperation(ctx context.Context, req *opsv1.CancelOperationRequest) (*opsv1.Operation, error) {
	n.mu.Lock()
	n.cancels = append(n.cancels, req.GetUid())
	o := n.ops[req.GetUid()]
	n.mu.Unlock()
	if o == nil {
		return nil, status.Error(codes.NotFound, "no such operation")
	}
	for asked := false; ; {
		n.mu.Lock()
		op, changed := proto.Clone(o.op).(*opsv1.Operation), o.changed
		n.mu.Unlock()
		if op.GetFinishTime() != nil {
			return op, nil
		}
		if op.GetPhase() > opsv1.Phase_PHASE_STAGING {
			return nil, status.Error(codes.FailedPrecondition, "the container is being stopped")
		}
		if !asked {
			asked = true
			o.cancelled <- req.GetReason()
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return op, nil
		}
	}
}
