// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"path/filepath"
	"slices"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	inplace "github.com/cri-proxy/cri-proxy/api/inplace/v1alpha1"
)

// shop is a StatefulSet behind a Service. With updateStrategy OnDelete its own controller leaves
// the pods alone, and the annotation has ours bring them to the template in place.
const shop = `apiVersion: v1
kind: Service
metadata: {name: shop}
spec: {clusterIP: None, selector: {app: shop}, ports: [{port: 8080}]}
---
apiVersion: apps/v1
kind: StatefulSet
metadata:
  name: shop
  annotations: {cri-proxy.io/in-place: "true"}
spec:
  replicas: 3
  serviceName: shop
  podManagementPolicy: Parallel
  updateStrategy: {type: OnDelete}
  selector: {matchLabels: {app: shop}}
  template:
    metadata: {labels: {app: shop}}
    spec:
      readinessGates: [{conditionType: cri-proxy.io/in-place-ready}]
      containers:
      - name: shop
        image: %s
        readinessProbe: {httpGet: {path: /readyz, port: 8080}, periodSeconds: 1}
`

// upgrade changes the image of a StatefulSet under traffic, and then to one that does not exist.
func (d *demo) upgrade(ctx context.Context) error {
	d.heading("A StatefulSet of three pods behind a Service, under traffic")
	manifest := fmt.Sprintf(shop, d.bed.Image("app:1"))
	_, _ = indent{d.out}.Write([]byte(manifest))
	d.say("")
	if err := d.kubectl(ctx, manifest, "apply", "-f", "-"); err != nil {
		return err
	}
	before, err := d.shopPods(ctx)
	if err != nil {
		return err
	}
	clients, err := d.startTraffic(ctx)
	if err != nil {
		return err
	}
	defer clients.stop()

	d.heading("kubectl set image: each pod gets it in place, one after another")
	began := time.Now()
	if err := d.kubectl(ctx, "", "set", "image", "sts/shop", "shop="+d.bed.Image("app:2")); err != nil {
		return err
	}
	name, err := d.shopRollout(ctx)
	if err != nil {
		return err
	}
	if err := d.kubectl(ctx, "", "wait", "--for=condition=Complete", "ipr/"+name, "--timeout=120s"); err != nil {
		return err
	}
	took := time.Since(began)
	if err := d.kubectl(ctx, "", "get", "ipr", name); err != nil {
		return err
	}
	after, err := d.shopPods(ctx)
	if err != nil {
		return err
	}
	d.say("")
	d.say("%-8s %-36s  %-14s %-12s %s", "POD", "UID", "IP", "RESTARTS", "IMAGE")
	for i, p := range after {
		old := before[i].Status.ContainerStatuses[0]
		now := p.Status.ContainerStatuses[0]
		d.say("%-8s %-36s  %-14s %d, was %d   %s", p.Name, p.UID, p.Status.PodIP, now.RestartCount, old.RestartCount,
			filepath.Base(now.Image))
		if p.UID != before[i].UID || p.Status.PodIP != before[i].Status.PodIP {
			return fmt.Errorf("pod %s is another one", p.Name)
		}
	}
	sent, failed := clients.count()
	d.say("")
	d.say("%8s  for three pods, with the same UIDs and addresses; %d of %d requests failed", round(took), failed, sent)

	d.heading("An image that does not exist: nothing is stopped, and the template gets the old one back")
	if err := d.kubectl(ctx, "", "set", "image", "sts/shop", "shop="+d.bed.Image("app:typo")); err != nil {
		return err
	}
	if err := d.kubectl(ctx, "", "wait", "--for=condition=Degraded", "ipr/"+name, "--timeout=120s"); err != nil {
		return err
	}
	if err := d.eventually(ctx, "the rollout is taken back", func(ctx context.Context) (bool, error) {
		r := &inplace.InPlaceRollout{}
		err := d.api.Get(ctx, client.ObjectKey{Namespace: "default", Name: name}, r)
		return slices.ContainsFunc(r.Status.Conditions, func(c metav1.Condition) bool {
			return c.Type == inplace.ConditionProgressing && c.Reason == inplace.ReasonRolledBack
		}), err
	}); err != nil {
		return err
	}
	if err := d.kubectl(ctx, "", "get", "ipr", name, "-o", `jsonpath={.status.message}{"\n"}`); err != nil {
		return err
	}
	if err := d.kubectl(ctx, "", "get", "sts/shop", "-o",
		`jsonpath={.spec.template.spec.containers[0].image}{"\n"}`); err != nil {
		return err
	}
	all, lost := clients.count()
	d.say("")
	d.say("%8d  of %d requests failed since", lost-failed, all-sent)
	return nil
}

// eventually waits for a condition.
func (d *demo) eventually(ctx context.Context, what string, cond func(context.Context) (bool, error)) error {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		if done, err := cond(ctx); done || err != nil {
			return err
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return fmt.Errorf("%s: %w; see the logs in %s", what, ctx.Err(), d.bed.Logs)
		}
	}
}

// shopPods returns the pods in order when all are ready.
func (d *demo) shopPods(ctx context.Context) ([]corev1.Pod, error) {
	list := &corev1.PodList{}
	err := d.eventually(ctx, "the pods of shop are not ready", func(ctx context.Context) (bool, error) {
		if err := d.api.List(ctx, list, client.InNamespace("default"),
			client.MatchingLabels{"app": "shop"}); err != nil {
			return false, err
		}
		ready := 0
		for _, p := range list.Items {
			for _, c := range p.Status.Conditions {
				if c.Type == corev1.PodReady && c.Status == corev1.ConditionTrue {
					ready++
				}
			}
		}
		return ready == 3, nil
	})
	slices.SortFunc(list.Items, func(a, b corev1.Pod) int {
		if a.Name < b.Name {
			return -1
		}
		return 1
	})
	return list.Items, err
}

// shopRollout returns the name of the rollout that follows the StatefulSet, once it has taken
// notice of the new template.
func (d *demo) shopRollout(ctx context.Context) (name string, err error) {
	err = d.eventually(ctx, "there is no rollout of shop", func(ctx context.Context) (bool, error) {
		list := &inplace.InPlaceRolloutList{}
		if err := d.api.List(ctx, list, client.InNamespace("default")); err != nil || len(list.Items) == 0 {
			return false, err
		}
		name = list.Items[0].Name
		return list.Items[0].Status.TargetImages["shop"] == d.bed.Image("app:2"), nil
	})
	return name, err
}

// traffic are clients of the Service: each request goes to one of its ready endpoints, on a
// connection of its own.
type traffic struct {
	cancel context.CancelFunc
	done   sync.WaitGroup

	mu           sync.Mutex
	endpoints    []string
	sent, failed int
}

// trafficPause is the time between two requests.
const trafficPause = 5 * time.Millisecond

func (d *demo) startTraffic(ctx context.Context) (*traffic, error) {
	ctx, cancel := context.WithCancel(ctx)
	t := &traffic{cancel: cancel}
	t.done.Go(func() { // the work of kube-proxy
		for ctx.Err() == nil {
			t.follow(ctx, d)
		}
	})
	err := d.eventually(ctx, "the Service has no endpoints", func(context.Context) (bool, error) {
		t.mu.Lock()
		defer t.mu.Unlock()
		return len(t.endpoints) == 3, nil
	})
	if err != nil {
		t.stop()
		return nil, err
	}
	t.done.Go(func() {
		tick := time.NewTicker(trafficPause)
		defer tick.Stop()
		for n := 0; ; n++ {
			select {
			case <-tick.C:
				t.done.Go(func() { t.request(ctx, n) })
			case <-ctx.Done():
				return
			}
		}
	})
	return t, nil
}

// follow keeps the endpoints up to date until the watch ends.
func (t *traffic) follow(ctx context.Context, d *demo) {
	watch, err := d.api.Watch(ctx, &discoveryv1.EndpointSliceList{}, client.InNamespace("default"),
		client.MatchingLabels{discoveryv1.LabelServiceName: "shop"})
	if err != nil {
		return
	}
	defer watch.Stop()
	for e := range watch.ResultChan() {
		slice, ok := e.Object.(*discoveryv1.EndpointSlice)
		if !ok {
			return
		}
		var ready []string
		for _, p := range slice.Endpoints {
			if p.Conditions.Ready != nil && *p.Conditions.Ready {
				ready = append(ready, net.JoinHostPort(p.Addresses[0], "8080"))
			}
		}
		t.mu.Lock()
		t.endpoints = ready
		t.mu.Unlock()
	}
}

func (t *traffic) request(ctx context.Context, n int) {
	t.mu.Lock()
	endpoints := t.endpoints
	t.mu.Unlock()
	err := fmt.Errorf("no endpoint is ready")
	if len(endpoints) > 0 {
		err = get(ctx, "http://"+endpoints[n%len(endpoints)]+"/")
	}
	if ctx.Err() != nil {
		return
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.sent++
	if err != nil {
		t.failed++
	}
}

func get(ctx context.Context, url string) error {
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return err
	}
	resp, err := (&http.Client{Transport: &http.Transport{DisableKeepAlives: true}}).Do(req)
	if err != nil {
		return err
	}
	return resp.Body.Close()
}

func (t *traffic) count() (sent, failed int) {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.sent, t.failed
}

func (t *traffic) stop() {
	t.cancel()
	t.done.Wait()
}
