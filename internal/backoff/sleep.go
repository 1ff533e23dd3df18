// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package backoff

import (
	"context"
	"time"
)

// Sleep waits for d. If ctx ends before, Sleep returns at once, with the error of ctx.
func Sleep(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
