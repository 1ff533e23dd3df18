// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package kruise

import (
	"context"
	"errors"
	"sync"
	"time"

	"github.com/sirupsen/logrus"
)

// StandBy is how soon a reconciler looks again at an object that came while the gate was closed.
const StandBy = 10 * time.Second

// Gate is open while the controllers of the kinds may work. A nil Gate is always open.
type Gate struct {
	mu    sync.RWMutex // read-locked by whoever works
	open  bool
	close []func()
}

// Enter reports whether the gate is open. If so, call leave after the work: the gate does not close
// before that.
func (g *Gate) Enter() (leave func(), open bool) {
	if g == nil {
		return func() {}, true
	}
	g.mu.RLock()
	if !g.open {
		g.mu.RUnlock()
		return nil, false
	}
	return g.mu.RUnlock, true
}

// OnClose registers f, which the gate calls when it has closed and nobody works any more: f ends
// what goes on outside of reconciles.
func (g *Gate) OnClose(f func()) {
	if g == nil {
		return
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	g.close = append(g.close, f)
}

func (g *Gate) set(open bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	was := g.open
	g.open = open
	if was && !open {
		for _, f := range g.close {
			f()
		}
	}
}

// Group is a set of controllers that work only while OpenKruise is not there. It is a
// manager.Runnable of the replica that leads.
type Group struct {
	Lookout *Lookout
	Gate    *Gate
	// SetUp adds the controllers, once, before the gate opens for the first time. While the gate
	// has never been open, no controller watches anything, so OpenKruise's definitions of the kinds
	// do not matter.
	SetUp func(context.Context) error
	// Kindless says that these controllers do not need the definitions of the kinds: the gate is
	// open whenever OpenKruise is not there.
	Kindless bool
	// HandOver leaves the objects to OpenKruise. The Group calls it with the gate closed, each time
	// OpenKruise has come.
	HandOver func(context.Context) error
	// Log must be set.
	Log logrus.FieldLogger
}

// NeedLeaderElection implements manager.LeaderElectionRunnable.
func (*Group) NeedLeaderElection() bool { return true }

// Start opens and closes the gate until ctx is done. It returns the error of SetUp.
func (g *Group) Start(ctx context.Context) error {
	defer g.Gate.set(false)
	ready, handed := false, false
	for {
		free, _, changed := g.Lookout.Free()
		if g.Kindless {
			free, changed = g.Lookout.Alone()
		}
		var again <-chan time.Time
		if free {
			if !ready {
				if err := g.SetUp(ctx); err != nil {
					return err
				}
				ready = true
			}
			handed = false
			g.Gate.set(true)
		} else {
			g.Gate.set(false)
			if g.Lookout.There() && !handed && g.HandOver != nil {
				err := g.HandOver(ctx)
				if handed = err == nil; err != nil && !errors.Is(err, context.Canceled) {
					g.Log.WithError(err).Warn("leaving requests and jobs to OpenKruise, which is tried again")
					again = time.After(Every)
				}
			}
		}
		select {
		case <-ctx.Done():
			return nil
		case <-changed:
		case <-again:
		}
	}
}
