// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package kruise

import (
	"context"
	"errors"
	"io"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/sirupsen/logrus"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"sigs.k8s.io/controller-runtime/pkg/client"
)

// cluster is what the API server answers.
type cluster struct {
	mu      sync.Mutex
	err     error
	hooks   map[string]bool
	daemons []string
	served  map[string]bool // Kind/version
}

func (c *cluster) change(f func(*cluster)) {
	c.mu.Lock()
	defer c.mu.Unlock()
	f(c)
}

func (c *cluster) Get(_ context.Context, key client.ObjectKey, _ client.Object, _ ...client.GetOption) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err != nil {
		return c.err
	}
	if !c.hooks[key.Name] {
		return apierrors.NewNotFound(schema.GroupResource{}, key.Name)
	}
	return nil
}

func (c *cluster) List(_ context.Context, list client.ObjectList, opts ...client.ListOption) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	var o client.ListOptions
	o.ApplyOptions(opts)
	if o.FieldSelector.String() != "metadata.name=kruise-daemon" {
		return errors.New("all DaemonSets were asked for")
	}
	for _, ns := range c.daemons {
		l := list.(*metav1.PartialObjectMetadataList)
		l.Items = append(l.Items,
			metav1.PartialObjectMetadata{ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: DaemonSet}})
	}
	return c.err
}

type mapper struct {
	meta.RESTMapper
	c *cluster
}

func (m mapper) RESTMapping(kind schema.GroupKind, versions ...string) (*meta.RESTMapping, error) {
	m.c.mu.Lock()
	defer m.c.mu.Unlock()
	if !m.c.served[kind.Kind+"/"+versions[0]] {
		return nil, &meta.NoKindMatchError{GroupKind: kind, SearchedVersions: versions}
	}
	return &meta.RESTMapping{}, nil
}

// Controllers that need no definitions work whenever OpenKruise is not there, and not before that
// is known.
func TestKindless(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := &cluster{hooks: map[string]bool{}, served: map[string]bool{}, err: errors.New("not yet")}
		log := logrus.New()
		log.SetOutput(io.Discard)
		l := &Lookout{Reader: c, Mapper: mapper{c: c}, Log: log}
		gate, did := &Gate{}, &record{}
		g := &Group{Lookout: l, Gate: gate, Log: log, Kindless: true,
			SetUp: func(context.Context) error { did.note("set up"); return nil }}
		ctx, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		wg.Go(func() { _ = l.Start(ctx) })
		wg.Go(func() { _ = g.Start(ctx) })
		defer wg.Wait()
		defer cancel()
		for _, step := range []struct {
			what   string
			change func(*cluster)
			open   bool
		}{
			{"nothing is known", func(*cluster) {}, false},
			{"there are no definitions", func(c *cluster) { c.err = nil }, true},
			{"OpenKruise has come", func(c *cluster) { c.hooks[MutatingWebhooks] = true }, false},
			{"it has gone, and its definitions with it", func(c *cluster) { delete(c.hooks, MutatingWebhooks) }, true},
		} {
			c.change(step.change)
			after(2*Every + time.Second)
			if open(gate) != step.open {
				t.Errorf("%s: open %v", step.what, !step.open)
			}
		}
		if did.said() != "set up" {
			t.Errorf("did %q", did.said())
		}
	})
}

// in runs f in a bubble with a cluster, which begin sets up, with a Lookout and a Group, and with a
// record of what the group did.
func in(t *testing.T, begin func(*cluster, *record), f func(*testing.T, *cluster, *Lookout, *Gate, *record)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		c := &cluster{hooks: map[string]bool{}, served: map[string]bool{
			"ContainerRecreateRequest/v1alpha1": true, "ImagePullJob/v1beta1": true, "ImageListPullJob/v1beta1": true,
		}}
		did := &record{}
		begin(c, did)
		log := logrus.New()
		log.SetOutput(io.Discard)
		l := &Lookout{Reader: c, Mapper: mapper{c: c}, Log: log}
		gate := &Gate{}
		g := &Group{
			Lookout: l, Gate: gate, Log: log,
			SetUp: func(context.Context) error {
				did.note("set up")
				gate.OnClose(func() { did.note("closed") })
				return nil
			},
			HandOver: func(context.Context) error { return did.handOver() },
		}
		ctx, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		wg.Go(func() { _ = l.Start(ctx) })
		wg.Go(func() { _ = g.Start(ctx) })
		defer wg.Wait()
		defer cancel()
		f(t, c, l, gate, did)
	})
}

type record struct {
	mu    sync.Mutex
	list  []string
	fails int
}

func (r *record) note(what string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.list = append(r.list, what)
}

func (r *record) handOver() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.fails > 0 {
		r.fails--
		return errors.New("conflict")
	}
	r.list = append(r.list, "handed over")
	return nil
}

func (r *record) said() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return strings.Join(r.list, ", ")
}

func open(g *Gate) bool {
	leave, is := g.Enter()
	if is {
		leave()
	}
	return is
}

func after(d time.Duration) {
	time.Sleep(d)
	synctest.Wait()
}

func TestNobodyElse(t *testing.T) {
	in(t, func(*cluster, *record) {}, func(t *testing.T, _ *cluster, l *Lookout, g *Gate, did *record) {
		after(time.Millisecond)
		if !open(g) || did.said() != "set up" || l.Note() != "" {
			t.Errorf("open %v, did %q, note %q", open(g), did.said(), l.Note())
		}
	})
}

// OpenKruise is there, goes, and comes again.
func TestComesAndGoes(t *testing.T) {
	for name, sign := range map[string]struct {
		put  func(*cluster, bool)
		text string
	}{
		"mutating webhooks":   {func(c *cluster, is bool) { c.hooks[MutatingWebhooks] = is }, MutatingWebhooks},
		"validating webhooks": {func(c *cluster, is bool) { c.hooks[ValidatingWebhooks] = is }, ValidatingWebhooks},
		"daemon": {func(c *cluster, is bool) {
			if c.daemons = nil; is {
				c.daemons = []string{"elsewhere"}
			}
		}, "elsewhere/kruise-daemon"},
	} {
		t.Run(name, func(t *testing.T) {
			in(t, func(c *cluster, did *record) { sign.put(c, true); did.fails = 1 },
				func(t *testing.T, c *cluster, l *Lookout, g *Gate, did *record) {
					after(Every + time.Second)
					if open(g) || did.said() != "handed over" {
						t.Errorf("open %v, did %q: want nothing begun, and objects left to it at the second try",
							open(g), did.said())
					}
					if n := l.Note(); !l.There() || !strings.Contains(n, "left to OpenKruise") ||
						!strings.Contains(n, sign.text) {
						t.Errorf("note %q does not name %q", n, sign.text)
					}
					c.change(func(c *cluster) { sign.put(c, false) })
					after(Every)
					if open(g) {
						t.Error("open after one look: it may be being replaced")
					}
					after(Every)
					if !open(g) || l.There() || l.Note() != "" {
						t.Errorf("open %v, there %v, note %q after it has gone", open(g), l.There(), l.Note())
					}
					c.change(func(c *cluster) { sign.put(c, true) })
					after(Every)
					if want := "handed over, set up, closed, handed over"; open(g) || did.said() != want {
						t.Errorf("open %v, did %q, want %q", open(g), did.said(), want)
					}
				})
		})
	}
}

// An API server that does not answer begins nothing, and ends nothing.
func TestNotKnown(t *testing.T) {
	in(t, func(c *cluster, _ *record) { c.err = errors.New("forbidden") },
		func(t *testing.T, c *cluster, l *Lookout, g *Gate, _ *record) {
			after(5 * time.Second)
			if open(g) || !strings.Contains(l.Note(), "not known") {
				t.Errorf("open %v, note %q", open(g), l.Note())
			}
			c.change(func(c *cluster) { c.err = nil })
			after(2 * time.Second)
			if !open(g) {
				t.Error("not open soon after the API server has told")
			}
			c.change(func(c *cluster) { c.err = errors.New("away") })
			after(time.Minute)
			if !open(g) {
				t.Error("closed because the API server was away")
			}
		})
}

// OpenKruise has gone, and its older definitions have stayed: controllers that could not watch the
// kinds do not begin.
func TestOlderDefinitions(t *testing.T) {
	in(t, func(c *cluster, _ *record) { delete(c.served, "ImagePullJob/v1beta1") },
		func(t *testing.T, c *cluster, l *Lookout, g *Gate, did *record) {
			after(time.Second)
			if n := l.Note(); open(g) || did.said() != "" ||
				!strings.Contains(n, "ImagePullJob in apps.kruise.io/v1beta1") ||
				!strings.Contains(n, "deploy/crds") {
				t.Errorf("open %v, did %q, note %q", open(g), did.said(), n)
			}
			c.change(func(c *cluster) { c.served["ImagePullJob/v1beta1"] = true })
			after(Every)
			if !open(g) {
				t.Error("not open with the definitions")
			}
		})
}

// The gate waits for those who work, and nobody begins meanwhile.
func TestGateWaits(t *testing.T) {
	g := &Gate{}
	g.set(true)
	closed := make(chan struct{})
	g.OnClose(func() { close(closed) })
	leave, is := g.Enter()
	if !is {
		t.Fatal("not open")
	}
	go g.set(false)
	select {
	case <-closed:
		t.Error("closed in the middle of work")
	case <-time.After(20 * time.Millisecond):
	}
	leave()
	<-closed
	if open(g) {
		t.Error("still open")
	}
	if leave, is := (*Gate)(nil).Enter(); !is {
		t.Error("no gate is closed")
	} else {
		leave()
	}
}
