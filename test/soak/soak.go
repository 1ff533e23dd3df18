// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"strconv"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"k8s.io/apimachinery/pkg/runtime"
	clientgoscheme "k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/tools/clientcmd"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	kube "sigs.k8s.io/controller-runtime/pkg/client"

	appsv1alpha1 "github.com/cri-proxy/cri-proxy/api/apps/v1alpha1"
	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/test/testbed"
)

// soak is one run.
type soak struct {
	o   options
	bed *testbed.Bed
	out *screen

	api     kube.Client
	ops     opsv1.OpsClient
	runtime runtimeapi.RuntimeServiceClient // containerd, around the proxy
	cri     runtimeapi.RuntimeServiceClient // what kubelet dials
	conns   []*grpc.ClientConn

	pods     []*pod
	ledger   *ledger
	sampler  *sampler
	restarts *restarter
	began    time.Time
	took     time.Duration
	// before are the proxy's figures when the pods were ready and nothing had been restarted.
	before sample

	background sync.WaitGroup
	stop       context.CancelFunc
}

// newSoak connects to a bed that is up. The caller calls close.
func newSoak(ctx context.Context, o options, bed *testbed.Bed, out io.Writer) (_ *soak, err error) {
	s := &soak{o: o, bed: bed, out: newScreen(out), ledger: newLedger(), stop: func() {}}
	defer func() {
		if err != nil {
			s.close()
		}
	}()
	config, err := clientcmd.BuildConfigFromFlags("", bed.Kubeconfig)
	if err != nil {
		return nil, err
	}
	config.QPS, config.Burst = 200, 400
	scheme := runtime.NewScheme()
	if err := errors.Join(clientgoscheme.AddToScheme(scheme), appsv1alpha1.AddToScheme(scheme)); err != nil {
		return nil, err
	}
	if s.api, err = kube.New(config, kube.Options{Scheme: scheme}); err != nil {
		return nil, err
	}
	for socket, use := range map[string]func(*grpc.ClientConn){
		bed.AdminSocket:   func(c *grpc.ClientConn) { s.ops = opsv1.NewOpsClient(c) },
		bed.RuntimeSocket: func(c *grpc.ClientConn) { s.runtime = runtimeapi.NewRuntimeServiceClient(c) },
		bed.CRISocket:     func(c *grpc.ClientConn) { s.cri = runtimeapi.NewRuntimeServiceClient(c) },
	} {
		conn, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()),
			grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(64<<20)))
		if err != nil {
			return nil, err
		}
		s.conns = append(s.conns, conn)
		use(conn)
	}
	if err := bed.InstallCRDs(ctx); err != nil {
		return nil, err
	}
	if err := bed.StartController(ctx); err != nil {
		return nil, err
	}
	s.sampler = &sampler{soak: s}
	return s, nil
}

// close ends everything that runs in the background.
func (s *soak) close() {
	s.stop()
	s.background.Wait()
	for _, c := range s.conns {
		_ = c.Close()
	}
}

// tell prints a line.
func (s *soak) tell(format string, args ...any) {
	s.out.line("%s  %s", time.Now().Format("15:04:05"), fmt.Sprintf(format, args...))
}

// run deploys the pods and restarts their containers until the time or the count is over.
func (s *soak) run(ctx context.Context) error {
	var background context.Context
	background, s.stop = context.WithCancel(ctx)
	s.background.Go(func() { s.ledger.follow(background, s.runtime) })
	if err := s.deploy(ctx); err != nil {
		return err
	}
	for _, p := range s.pods {
		for _, sl := range p.slots {
			sl.client = newClient("http://" + net.JoinHostPort(p.ip, strconv.Itoa(sl.port)) + "/")
			s.background.Go(func() { sl.client.run(background) })
			if err := sl.client.await(ctx, time.Time{}); err != nil {
				return err
			}
		}
	}
	s.sayMethods(ctx)
	var err error
	if s.before, err = s.sampler.take(ctx); err != nil {
		return err
	}
	s.restarts = &restarter{soak: s, rand: rand.New(rand.NewPCG(s.o.seed, s.o.seed)),
		idle: append([]*pod(nil), s.pods...), left: -1}
	if s.o.restarts > 0 {
		s.restarts.left = s.o.restarts
	}
	s.began = time.Now()
	if s.o.time > 0 {
		s.restarts.until = s.began.Add(s.o.time)
	}
	s.tell("%d pods with %d containers are ready; restarting, seed %d", len(s.pods), len(s.slots()), s.o.seed)
	watching, enough := context.WithCancel(background)
	var sampled sync.WaitGroup
	sampled.Go(func() { s.sampler.run(watching) })
	s.restarts.run(ctx)
	s.took = time.Since(s.began)
	enough()
	sampled.Wait()
	return ctx.Err()
}

func (s *soak) slots() []*slot {
	var out []*slot
	for _, p := range s.pods {
		out = append(out, p.slots...)
	}
	return out
}

// sayMethods prints how the node may restart.
func (s *soak) sayMethods(ctx context.Context) {
	info, err := s.ops.NodeInfo(ctx, &opsv1.NodeInfoRequest{})
	if err != nil {
		s.tell("the node does not describe itself: %v", err)
		return
	}
	for _, m := range info.GetRestartMethods() {
		if m.GetAvailable() {
			s.tell("restart method %s is available", m.GetName())
		} else {
			s.tell("restart method %s is not available: %s", m.GetName(), m.GetReason())
		}
	}
}
