// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package evaluate

import (
	"context"
	"fmt"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/cri-proxy/cri-proxy/controller"
)

// Stamp returns the time in the API's resolution of one second, rounded up, so that a wait that is counted from it is never too short.
func Stamp(now time.Time) metav1.Time {
	return metav1.NewTime(now.Add(time.Second - 1).Truncate(time.Second))
}

// Sooner returns the shorter of two waits, where 0 means never.
func Sooner(a, b time.Duration) time.Duration {
	if a == 0 || (b != 0 && b < a) {
		return b
	}
	return a
}

// SpecError is an error that the user has to correct.
type SpecError = controller.SpecError

// Wrong returns a specError.
func Wrong(format string, args ...any) error {
	return &SpecError{Message: fmt.Sprintf(format, args...)}
}

// Pause waits and says whether to go on.
func Pause(ctx context.Context, d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-ctx.Done():
		return false
	}
}
