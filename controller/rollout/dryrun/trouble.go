// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package dryrun

import (
	"errors"
	"fmt"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"

	"github.com/cri-proxy/cri-proxy/controller/retry"
	"github.com/cri-proxy/cri-proxy/controller/rollout/evaluate"
)

// IsAPIStatus returns true if an error is an answer of the API server.
func IsAPIStatus(err error) bool {
	var status apierrors.APIStatus
	return errors.As(err, &status)
}

// TooLong returns the failure of a pod whose change the API server has not accepted within the
// deadline.
func TooLong(pod string, deadline time.Duration, err error) evaluate.Failure {
	return evaluate.Failure{Reason: evaluate.FailDeadline,
		Message: fmt.Sprintf("pod %s could not be changed for %s: %s", pod, deadline, err)}
}

// retryMax bounds the wait between two tries.
const retryMax = 30 * time.Second

// Trouble counts errors of the API server that may pass, such as a webhook that is away, or a
// time-out.
type Trouble struct {
	Count int
	Text  string
	// Since is when the trouble began. Nobody tries again before Until.
	Since, Until time.Time
}

// Note counts an error.
func (t *Trouble) Note(err error, now time.Time) {
	if t.Count++; t.Count == 1 {
		t.Since = now
	}
	t.Text, t.Until = err.Error(), now.Add(retry.Backoff(t.Count-1, time.Second, retryMax))
}
