// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package rollout

import (
	"context"
	"fmt"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/cri-proxy/cri-proxy/controller"
)

// stamp returns the time in the API's resolution of one second, rounded up, so that a wait that is counted from it is never too short.
func stamp(now time.Time) metav1.Time {
	return metav1.NewTime(now.Add(time.Second - 1).Truncate(time.Second))
}

// sooner returns the shorter of two waits, where 0 means never.
func sooner(a, b time.Duration) time.Duration {
	if a == 0 || (b != 0 && b < a) {
		return b
	}
	return a
}

// specError is an error that the user has to correct.
type specError = controller.SpecError

// wrong returns a specError.
func wrong(format string, args ...any) error {
	return &specError{Message: fmt.Sprintf(format, args...)}
}

// pause waits and says whether to go on.
func pause(ctx context.Context, d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-ctx.Done():
		return false
	}
}
