// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package rollout

import (
	"errors"
	"fmt"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
)

// IsAPIStatus returns true if an error is an answer of the API server.
func apiStatus(err error) bool {
	var status apierrors.APIStatus
	return errors.As(err, &status)
}

// tooLong returns the failure of a pod whose change the API server has not accepted within the deadline.
func tooLong(pod string, deadline time.Duration, err error) failure {
	return failure{failDeadline, fmt.Sprintf("pod %s could not be changed for %s: %s", pod, deadline, err)}
}

// retryMax bounds the wait between two tries.
const troublePauseMax = 30 * time.Second

// Trouble counts errors of the API server that may pass, such as a webhook that is away, or a time-out.
type apiTrouble struct {
	count int
	text  string
	// since is when the trouble began. Nobody tries again before until.
	since, until time.Time
}

// note counts an error.
func (t *apiTrouble) note(err error, now time.Time) {
	if t.count++; t.count == 1 {
		t.since = now
	}
	t.text, t.until = err.Error(), now.Add(min(time.Second<<min(t.count-1, 5), troublePauseMax))
}
