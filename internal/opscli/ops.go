// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package opscli

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"google.golang.org/protobuf/proto"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
)

// listInterval is how often WatchList asks for the list: the daemon has a watch of one operation
// only, and people do not read faster.
const listInterval = time.Second

// WatchList prints the list of operations, then a row for each operation that is new or has
// changed, until ctx ends.
func (c Client) WatchList(ctx context.Context, p *Printer, activeOnly bool) error {
	conn, err := c.connect(ctx)
	if err != nil {
		return err
	}
	defer conn.Close()
	client := opsv1.NewOpsClient(conn)
	tick := time.NewTicker(listInterval)
	defer tick.Stop()
	shown := map[string]*opsv1.Operation{}
	t := newTable(p.Out, p.listColumns()...)
	for {
		l, err := list(ctx, client, activeOnly)
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return plain(err)
		}
		var changed []*opsv1.Operation
		shown, changed = changes(shown, l.GetOperations())
		for _, op := range changed {
			if p.Format.structured() {
				if err := p.message(op); err != nil {
					return err
				}
				continue
			}
			t.row(p.listRow(op)...)
		}
		if err := t.flush(); err != nil {
			return err
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil
		}
	}
}

func list(ctx context.Context, client opsv1.OpsClient, activeOnly bool) (*opsv1.ListOperationsResponse, error) {
	call, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	return client.ListOperations(call, &opsv1.ListOperationsRequest{ActiveOnly: activeOnly})
}

// changes returns the operations by UID, and those that differ from the ones shown before. The
// newest is the last, as lines appear.
func changes(
	shown map[string]*opsv1.Operation, ops []*opsv1.Operation,
) (present map[string]*opsv1.Operation, changed []*opsv1.Operation) {
	present = map[string]*opsv1.Operation{}
	for _, op := range ops {
		if !proto.Equal(shown[op.GetUid()], op) {
			changed = append(changed, op)
		}
		present[op.GetUid()] = op
	}
	slices.Reverse(changed)
	return present, changed
}

// Describe returns kind, pod and phase of an operation, for completion.
func Describe(op *opsv1.Operation) string {
	return fmt.Sprintf("%s %s %s", op.GetKind(), podName(op.GetPod()), phaseName(op.GetPhase()))
}

// outcome is the error of a finished operation, nil if the operation succeeded.
func outcome(op *opsv1.Operation) error {
	switch op.GetPhase() {
	case opsv1.Phase_PHASE_SUCCEEDED:
		return nil
	case opsv1.Phase_PHASE_CANCELLED:
		return fmt.Errorf("operation %s was cancelled: %s", op.GetUid(), op.GetMessage())
	}
	if op.GetMessage() == "" {
		return fmt.Errorf("operation %s: %w", op.GetUid(), errors.New("failed"))
	}
	return fmt.Errorf("operation %s: %s", op.GetUid(), op.GetMessage())
}
