// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package imagepull

import (
	"context"
	"time"

	"github.com/cri-proxy/cri-proxy/controller/imagepull/command"
	"github.com/cri-proxy/cri-proxy/controller/retry"
)

// cleanUpTimeout is how long nodes that do not answer are told to forget a job.
const cleanUpTimeout = 30 * time.Second

// cleanUp cancels the job's pulls on the nodes, with code, and, with pins, releases its pins. It
// goes on until all nodes have answered or cleanUpTimeout has passed, and then calls done with the
// number of nodes that have not answered.
func (j *jobState) cleanUp(nodes []*nodeState, pins bool, code string, done func(left int)) {
	if len(nodes) == 0 {
		return
	}
	var left []command.Removed
	for _, n := range nodes {
		left = append(left, command.Removed{Node: n.target.Node, Quiet: n.quiet})
	}
	s := j.table.spec
	j.crew.Do(func(ctx context.Context) {
		ctx, cancel := context.WithTimeout(ctx, cleanUpTimeout)
		defer cancel()
		for wait := retryInterval; ; wait = min(2*wait, retryIntervalMax) {
			left = j.command.CleanUp(ctx, s, left, pins, code)
			if len(left) == 0 || !retry.Sleep(ctx, wait) {
				break
			}
		}
		if len(left) > 0 {
			j.log.WithField("nodes", len(left)).Warn("nodes could not be told to leave the job alone: " +
				"what they pull goes on, and what they pin expires")
		}
		done(len(left))
	})
}

// cleanUpAll is cleanUp on all nodes of the job. It returns how many these are.
func (j *jobState) cleanUpAll(pins bool, code string, done func(left int)) int {
	j.cleanUp(j.table.nodes, pins, code, done)
	return len(j.table.nodes)
}
