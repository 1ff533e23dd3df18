// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/types"
	kube "sigs.k8s.io/controller-runtime/pkg/client"
)

// Objects is the same command given in the other way that is in use: an object for each node, which
// the node watches and writes its result into, as NodeImage of OpenKruise. It has the API server's
// work for both ways.
type Objects struct {
	// Commanded is from the first object written to the last node that has seen its own, Completed
	// to the last result seen.
	Commanded float64 `json:"commanded_seconds"`
	Completed float64 `json:"completed_seconds"`
	APIWrites int     `json:"api_writes"`
	Watches   int     `json:"watches"`
	// APICPU is the CPU time of API server and etcd.
	APICPU float64 `json:"api_cpu_seconds"`
	// APIRSS is how much the API server has grown by with the watches open, in MiB.
	APIRSS float64 `json:"api_rss_growth_mib"`
}

const (
	commandKey = "image"
	resultKey  = "result"
)

// objects runs the other way over n nodes. The objects are there and watched before the time
// begins.
func (b *fanoutBench) objects(ctx context.Context, n int) (o Objects, err error) {
	ns := fmt.Sprintf("objects-%d", n)
	if err := b.api.Create(ctx, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: ns}}); err != nil {
		return o, err
	}
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	before, err := rss(b.bed.Pid("kube-apiserver"))
	if err != nil {
		return o, err
	}
	maker, mctx := errgroup.WithContext(ctx)
	maker.SetLimit(16)
	for i := range n {
		maker.Go(func() error {
			return b.api.Create(mctx,
				&corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: nodeName(i)}})
		})
	}
	if err := maker.Wait(); err != nil {
		return o, err
	}
	nodes, nctx := errgroup.WithContext(ctx)
	commanded, watching := make(chan time.Time, n), make(chan struct{}, n)
	for i := range n {
		nodes.Go(func() error { return b.objectNode(nctx, ns, nodeName(i), watching, commanded) })
	}
	for range n {
		select {
		case <-watching:
		case <-nctx.Done():
			return o, errors.Join(nodes.Wait(), ctx.Err())
		}
	}
	grown, err := rss(b.bed.Pid("kube-apiserver"))
	if err != nil {
		return o, err
	}
	cpu, err := b.apiCPU()
	if err != nil {
		return o, err
	}
	began := time.Now()
	write, wctx := errgroup.WithContext(ctx)
	write.SetLimit(32)
	for i := range n {
		write.Go(func() error { return b.setKey(wctx, ns, nodeName(i), commandKey, "registry.invalid/app:1") })
	}
	if err := b.results(nctx, ns, n); err != nil {
		return o, errors.Join(err, context.Cause(nctx))
	}
	o.Completed = time.Since(began).Seconds()
	if err := write.Wait(); err != nil {
		return o, err
	}
	after, err := b.apiCPU()
	if err != nil {
		return o, err
	}
	var last time.Time
	for range n {
		if at := <-commanded; at.After(last) {
			last = at
		}
	}
	o.Commanded, o.APIWrites, o.Watches, o.APICPU, o.APIRSS = last.Sub(began).Seconds(), 2*n, n, after-cpu, grown-before
	stop()
	if err := nodes.Wait(); err != nil && !errors.Is(err, context.Canceled) {
		return o, err
	}
	return o, b.api.Delete(context.WithoutCancel(ctx), &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: ns}})
}

// results waits until n objects have a result. It begins anew where the API server finds it too
// slow.
func (b *fanoutBench) results(ctx context.Context, ns string, n int) error {
	for done := map[string]bool{}; ; {
		w, err := b.api.Watch(ctx, &corev1.ConfigMapList{}, kube.InNamespace(ns))
		if err != nil {
			return err
		}
		for e := range w.ResultChan() {
			if c, ok := e.Object.(*corev1.ConfigMap); ok && c.Data[resultKey] != "" {
				done[c.Name] = true
			}
			if len(done) == n {
				break
			}
		}
		w.Stop()
		if len(done) == n || ctx.Err() != nil {
			return ctx.Err()
		}
	}
}

// objectNode is one node: it watches its object until it has a command, takes its second, and
// writes the result.
func (b *fanoutBench) objectNode(
	ctx context.Context, ns, name string, watching chan<- struct{}, commanded chan<- time.Time,
) error {
	w, err := b.api.Watch(ctx, &corev1.ConfigMapList{}, kube.InNamespace(ns),
		&kube.ListOptions{FieldSelector: fields.OneTermEqualSelector("metadata.name", name)})
	if err != nil {
		return err
	}
	defer w.Stop()
	watching <- struct{}{}
	for told := false; ; {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case e, ok := <-w.ResultChan():
			if !ok {
				return fmt.Errorf("the watch of %s has ended", name)
			}
			c, ok := e.Object.(*corev1.ConfigMap)
			if !ok || told || c.Data[commandKey] == "" {
				continue
			}
			told = true
			commanded <- time.Now()
			if err := pause(ctx, pullTakes); err != nil {
				return err
			}
			if err := b.setKey(ctx, ns, name, resultKey, "Pulled"); err != nil {
				return err
			}
		}
	}
}

func (b *fanoutBench) setKey(ctx context.Context, ns, name, key, value string) error {
	return b.api.Patch(ctx, &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: name}},
		kube.RawPatch(types.MergePatchType, fmt.Appendf(nil, `{"data":{%q:%q}}`, key, value)))
}

// apiCPU is what API server and etcd have used, in seconds.
func (b *fanoutBench) apiCPU() (float64, error) {
	sum := 0.0
	for _, name := range []string{"kube-apiserver", "etcd"} {
		data, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", b.bed.Pid(name)))
		if err != nil {
			return 0, err
		}
		// Fields 14 and 15, in ticks of 10 ms, counted behind the name in parentheses.
		f := strings.Fields(string(data[strings.LastIndexByte(string(data), ')')+1:]))
		var user, system float64
		if _, err := fmt.Sscan(f[11]+" "+f[12], &user, &system); err != nil {
			return 0, err
		}
		sum += (user + system) / 100
	}
	return sum, nil
}
