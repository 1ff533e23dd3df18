// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package testbed

import (
	"context"
	"fmt"
	"io"
	"time"
)

// Info describes a bed of this machine to a person.
type Info struct {
	ID, Mode, Dir string
	// State is running, detached or dead; a dead one is swept by the next Start.
	State string
	// OwnerPID is the process that started it.
	OwnerPID   int
	Started    time.Time
	CRISocket  string
	Kubeconfig string
}

// List returns all beds of this machine.
func List() ([]Info, error) {
	l := ledger{root: runRoot}
	recs, err := l.records()
	if err != nil {
		return nil, err
	}
	out := make([]Info, 0, len(recs))
	for _, r := range recs {
		info := Info{ID: r.ID, Mode: r.Mode, Dir: r.Dir, State: "dead", OwnerPID: r.Owner.PID, Started: r.Started, Kubeconfig: r.Kubeconfig}
		if len(r.Nodes) > 0 {
			info.CRISocket = r.Nodes[0].CRI
		}
		switch {
		case r.Detached && r.Boot == bootID():
			info.State = "detached"
		case r.Owner.alive():
			info.State = "running"
		}
		out = append(out, info)
	}
	return out, nil
}

// Destroy removes a detached or dead bed. It refuses one whose owner runs.
func Destroy(ctx context.Context, id string, log io.Writer) error {
	l := ledger{root: runRoot}
	unlock, err := l.lock(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	recs, err := l.records()
	if err != nil {
		return err
	}
	for _, r := range recs {
		if r.ID != id {
			continue
		}
		release, held, err := l.hold(id)
		if err != nil {
			return err
		}
		if !held {
			return fmt.Errorf("bed %s belongs to process %d, which runs: end that instead", id, r.Owner.PID)
		}
		defer release()
		began := time.Now()
		if err := l.destroy(ctx, r); err != nil {
			return err
		}
		fmt.Fprintf(log, "bed %s removed in %.1fs\n", id, time.Since(began).Seconds())
		return nil
	}
	return fmt.Errorf("there is no bed %q: see testbed list", id)
}
