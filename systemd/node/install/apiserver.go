// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package install

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"time"

	"github.com/cri-proxy/cri-proxy/ops/apiserver"
)

// notReady returns nil if kubelet has reported since then that the node is ready.
func notReady(ctx context.Context, c *apiserver.Client, node string, since time.Time) error {
	var n struct {
		Status struct {
			Conditions []struct {
				Type, Status, Reason, Message string
				LastHeartbeatTime             time.Time
			}
		}
	}
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	if err := c.Do(ctx, http.MethodGet, "/api/v1/nodes/"+url.PathEscape(node), nil, &n); err != nil {
		return err
	}
	for _, c := range n.Status.Conditions {
		switch {
		case c.Type != "Ready":
		case c.LastHeartbeatTime.Before(since.Truncate(time.Second)):
			return fmt.Errorf("kubelet has not reported the state of node %s since it was restarted", node)
		case c.Status != "True":
			return fmt.Errorf("node %s is not ready: %s: %s", node, c.Reason, c.Message)
		default:
			return nil
		}
	}
	return errors.New("node " + node + " has no Ready condition")
}
