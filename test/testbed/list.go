// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package testbed

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
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
		info := Info{ID: r.ID, Mode: r.Mode, Dir: r.Dir, State: "dead", OwnerPID: r.Owner.PID, Started: r.Started,
			Kubeconfig: r.Kubeconfig}
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
	if i := slices.IndexFunc(recs, func(r record) bool { return r.ID == id }); i >= 0 {
		r := recs[i]
		release, held, err := l.hold(id)
		if err != nil {
			return err
		}
		if !held {
			return fmt.Errorf("bed %s belongs to process %d, which runs: end that instead", id, r.Owner.PID)
		}
		defer release()
		began := time.Now()
		l.removePods(ctx, r, log)
		if err := l.destroy(ctx, r); err != nil {
			return err
		}
		fmt.Fprintf(log, "bed %s removed in %.1fs\n", id, time.Since(began).Seconds())
		return nil
	}
	return fmt.Errorf("there is no bed %q: see testbed list", id)
}

// removePods lets the bed's containerds, where they run, remove their pods in order. kubelets go
// first: they would bring them back.
func (l ledger) removePods(ctx context.Context, r record, log io.Writer) {
	files, _ := filepath.Glob(filepath.Join(l.runDir(r.ID), "pid", "*.json"))
	for _, f := range files {
		var p identity
		b, err := os.ReadFile(f)
		if err == nil && json.Unmarshal(b, &p) == nil && !strings.HasSuffix(f, "containerd.json") {
			_ = p.kill(ctx) // destroy finds what survives
		}
	}
	for i := range r.Nodes {
		socket := filepath.Join(l.runDir(r.ID), fmt.Sprintf("n%d", i), "containerd.sock")
		if err := removePods(ctx, socket); err != nil {
			fmt.Fprintf(log, "remove pods of node %d, which now go by force: %v\n", i, err)
		}
	}
}
