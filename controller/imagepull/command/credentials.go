// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package command

import (
	"context"
	"sync"
	"time"

	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/cri-proxy/cri-proxy/controller/imagepull/spec"
	"github.com/cri-proxy/cri-proxy/controller/pullsecrets"
)

const (
	// SecretsMaxAge is how long secrets are used that were read.
	SecretsMaxAge = 30 * time.Second
	// SecretsMaxAgeForRenewal is the same for a node that needs other secrets than it has: a job
	// reads them at most twice a second, whatever the number of its nodes.
	SecretsMaxAgeForRenewal = 500 * time.Millisecond
	// secretsTimeout bounds one reading.
	secretsTimeout = 10 * time.Second
)

// credentials reads the pull secrets of a job, and keeps them for a while.
type credentials struct {
	from client.Reader
	// noted is called with the secrets of before, nil if there are none, and those just read.
	noted func(before, keys *pullsecrets.Keyring)

	// mu lets one goroutine at a time read. It is taken before the job's mutex.
	mu     sync.Mutex
	keys   *pullsecrets.Keyring
	of     *spec.Spec // whose secrets keys are
	readAt time.Time
}

// read returns secrets that are no older than maxAge, or older ones if new ones cannot be read.
func (c *credentials) read(ctx context.Context, s *spec.Spec, maxAge time.Duration) (*pullsecrets.Keyring, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	known := c.keys != nil && s.SameSecrets(c.of)
	if known && time.Since(c.readAt) < maxAge {
		return c.keys, nil
	}
	ctx, cancel := context.WithTimeout(ctx, secretsTimeout)
	defer cancel()
	keys, err := pullsecrets.Read(ctx, c.from, s.Job.Namespace, pullsecrets.DefaultAccount, s.Secrets, "pullSecrets")
	if err != nil {
		if known {
			return c.keys, nil // those of before are as good as any
		}
		return nil, err
	}
	c.noted(c.keys, keys)
	c.keys, c.of, c.readAt = keys, s, time.Now()
	return keys, nil
}
