// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package ops

import (
	"context"
	"time"

	"github.com/cri-proxy/cri-proxy/ops/crinode"
	failpoints "github.com/cri-proxy/cri-proxy/ops/failpoint"
)

// This package's own names for what is in crinode and failpoint.

// Method is one of the methods of api/ops/v1.
type Method = string

func sleep(ctx context.Context, d time.Duration) error { return crinode.Sleep(ctx, d) }

func failpoint(name string) { failpoints.Reach(name) }
