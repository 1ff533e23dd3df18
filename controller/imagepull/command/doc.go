// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

// Package command commands the nodes for one job: it tells them to pull, follows the pulls, asks
// what they have, and cancels. It knows nothing of the state of the job.
package command
